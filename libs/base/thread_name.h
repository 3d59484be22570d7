// Names the calling thread, for `top -H`, debuggers and tests. At most 15 characters.
#pragma once

#include <pthread.h>

namespace minke {

inline void SetThreadName(const char* name) { (void)pthread_setname_np(pthread_self(), name); }

}  // namespace minke
