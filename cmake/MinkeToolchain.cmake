find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
endif()
find_program(MOLD mold)
if(MOLD)
  add_link_options(-fuse-ld=mold)
endif()

set(MK_SANITIZE "" CACHE STRING "address,undefined | thread | empty")
if(MK_SANITIZE)
  add_compile_options(-fsanitize=${MK_SANITIZE} -fno-omit-frame-pointer -g1
                      -Wno-maybe-uninitialized)  # what is instrumented confuses GCC 12
  add_link_options(-fsanitize=${MK_SANITIZE})
  if(MK_SANITIZE STREQUAL "thread")
    add_compile_options(-Wno-tsan)  # asio's queues have fences, which the sanitizer does not model
  endif()
endif()

# libFuzzer targets (tests/fuzz), built by clang: everything of ours counts edges, under AddressSanitizer and UBSan.
option(MK_FUZZ "build tests/fuzz instead of everything else" OFF)
if(MK_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "MK_FUZZ needs clang, which has libFuzzer; found ${CMAKE_CXX_COMPILER_ID}")
  endif()
  set(MK_FUZZ_SANITIZERS address,undefined)
  add_compile_options(-fsanitize=fuzzer-no-link,${MK_FUZZ_SANITIZERS} -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${MK_FUZZ_SANITIZERS})
endif()

# Ours only: attached per target by mk_library, never to what we include.
set(MK_WARNINGS -Wall -Wextra -Werror -Wno-missing-field-initializers)
