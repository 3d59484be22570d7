get_filename_component(MK_ROOT ${CMAKE_CURRENT_LIST_DIR} DIRECTORY)   # the repository

# mk_library(NAME transport_ucx SRCS a.cc b.cc DEPS minke::base)   defines minke_transport_ucx and minke::transport_ucx
function(mk_library)
  cmake_parse_arguments(A "" "NAME" "SRCS;DEPS;PRIVATE_DEPS" ${ARGN})
  set(target minke_${A_NAME})
  if(A_SRCS)
    add_library(${target} STATIC ${A_SRCS})
    target_include_directories(${target} PUBLIC ${MK_ROOT})
    target_compile_options(${target} PRIVATE ${MK_WARNINGS})
    target_link_libraries(${target} PUBLIC ${A_DEPS} PRIVATE ${A_PRIVATE_DEPS})
  else()
    add_library(${target} INTERFACE)
    target_include_directories(${target} INTERFACE ${MK_ROOT})
    target_link_libraries(${target} INTERFACE ${A_DEPS})
  endif()
  add_library(minke::${A_NAME} ALIAS ${target})
endfunction()

# mk_test(NAME wire_test SRCS frame_test.cc DEPS minke::wire [TIMEOUT 120])
function(mk_test)
  cmake_parse_arguments(A "" "NAME;TIMEOUT" "SRCS;DEPS" ${ARGN})
  add_executable(${A_NAME} ${A_SRCS})
  target_include_directories(${A_NAME} PRIVATE ${MK_ROOT})
  target_compile_options(${A_NAME} PRIVATE ${MK_WARNINGS})
  target_link_libraries(${A_NAME} PRIVATE ${A_DEPS} GTest::gtest GTest::gmock GTest::gtest_main)
  set_target_properties(${A_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/test-bin)
  add_test(NAME ${A_NAME} COMMAND ${A_NAME} WORKING_DIRECTORY ${MK_ROOT})
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 120)
  endif()
  set_tests_properties(${A_NAME} PROPERTIES TIMEOUT ${A_TIMEOUT} ENVIRONMENT
    "TSAN_OPTIONS=suppressions=${MK_ROOT}/cmake/tsan.supp ignore_noninstrumented_modules=1;UCX_MEM_MMAP_HOOK_MODE=none")
endfunction()

# mk_program(NAME minke-router SRCS main.cc DEPS minke::router)
function(mk_program)
  cmake_parse_arguments(A "" "NAME" "SRCS;DEPS" ${ARGN})
  add_executable(${A_NAME} ${A_SRCS})
  target_include_directories(${A_NAME} PRIVATE ${MK_ROOT})
  target_compile_options(${A_NAME} PRIVATE ${MK_WARNINGS})
  target_link_libraries(${A_NAME} PRIVATE ${A_DEPS})
endfunction()

# mk_proto_library(NAME proto PROTOS inference/inference.proto cluster/cluster.proto): messages and gRPC stubs.
function(mk_proto_library)
  cmake_parse_arguments(A "" "NAME" "PROTOS" ${ARGN})
  set(generated)
  foreach(proto ${A_PROTOS})
    string(REGEX REPLACE "\\.proto$" "" stem ${proto})
    set(out ${CMAKE_BINARY_DIR}/generated/proto/${stem})
    get_filename_component(dir ${out} DIRECTORY)
    file(MAKE_DIRECTORY ${dir})
    add_custom_command(
      OUTPUT ${out}.pb.cc ${out}.pb.h ${out}.grpc.pb.cc ${out}.grpc.pb.h
      COMMAND protobuf::protoc --cpp_out=${CMAKE_BINARY_DIR}/generated --grpc_out=${CMAKE_BINARY_DIR}/generated
              --plugin=protoc-gen-grpc=${GRPC_CPP_PLUGIN} -I${MK_ROOT} ${MK_ROOT}/proto/${proto}
      DEPENDS ${MK_ROOT}/proto/${proto} VERBATIM)
    list(APPEND generated ${out}.pb.cc)
    if(NOT MK_FUZZ)   # whose targets call nobody: half of what there is to compile
      list(APPEND generated ${out}.grpc.pb.cc)
    endif()
  endforeach()
  add_library(minke_${A_NAME} STATIC ${generated})
  target_include_directories(minke_${A_NAME} SYSTEM PUBLIC ${CMAKE_BINARY_DIR}/generated)
  target_link_libraries(minke_${A_NAME} PUBLIC gRPC::grpc++ protobuf::libprotobuf)
  add_library(minke::${A_NAME} ALIAS minke_${A_NAME})
endfunction()
