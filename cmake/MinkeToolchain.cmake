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

# Ours only: attached per target by mk_library, never to what we include.
set(MK_WARNINGS -Wall -Wextra -Werror -Wno-missing-field-initializers)
