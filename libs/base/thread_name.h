// The calling thread's name and priority.
#pragma once

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

namespace minke {

// For `top -H`, debuggers and tests. At most 15 characters.
inline void SetThreadName(const char* name) { (void)pthread_setname_np(pthread_self(), name); }

// Others on this host come first, as with nice(1). On Linux a thread has a niceness of its own.
inline void YieldToOthers(int niceness) { (void)setpriority(PRIO_PROCESS, gettid(), niceness); }

}  // namespace minke
