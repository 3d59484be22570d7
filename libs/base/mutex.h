// std::mutex with thread-safety annotations, and waiting for a condition on what it guards.
//
// Not Mutex: ThreadSanitizer does not see into the system's Abseil, which was built without it, and would
// take everything such a mutex guards for a race.
#pragma once

#include <condition_variable>
#include <mutex>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"

namespace minke {

class ABSL_LOCKABLE Mutex {
 public:
  void lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() { mutex_.lock(); }
  void unlock() ABSL_UNLOCK_FUNCTION() {
    // Whoever waits looks at its condition again after every critical section: nobody has to remember to
    // notify.
    if (waiters_ > 0) changed_.notify_all();
    mutex_.unlock();
  }
  bool try_lock() ABSL_EXCLUSIVE_TRYLOCK_FUNCTION(true) { return mutex_.try_lock(); }
  // For the analysis only: callbacks that run under the lock, but through an interface that cannot say so.
  void AssertHeld() ABSL_ASSERT_EXCLUSIVE_LOCK() {}

  // Waits until `condition()` holds; it is called under the lock. Held before and after.
  template <typename Condition>
  void Await(const Condition& condition) ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    Waiting waiting(*this);
    changed_.wait(waiting.lock, condition);
  }

  // The same for at most `timeout`. Returns whether the condition holds.
  template <typename Condition>
  bool AwaitFor(absl::Duration timeout, const Condition& condition) ABSL_EXCLUSIVE_LOCKS_REQUIRED(this) {
    Waiting waiting(*this);
    return changed_.wait_for(waiting.lock, absl::ToChronoNanoseconds(timeout), condition);
  }

 private:
  // Lends the held mutex to the condition variable, and takes it back held. A waiter counts as one only once
  // it is about to sleep: what it did in this critical section before must wake the others too.
  struct Waiting {
    explicit Waiting(Mutex& mutex) : mutex(mutex), lock(mutex.mutex_, std::adopt_lock) {
      if (mutex.waiters_++ > 0) mutex.changed_.notify_all();
    }
    ~Waiting() {
      --mutex.waiters_;
      lock.release();
    }
    Mutex& mutex;
    std::unique_lock<std::mutex> lock;
  };

  std::mutex mutex_;
  std::condition_variable changed_;
  int waiters_ = 0;  // guarded by mutex_
};

class ABSL_SCOPED_LOCKABLE MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ABSL_EXCLUSIVE_LOCK_FUNCTION(mutex) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() ABSL_UNLOCK_FUNCTION() { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

}  // namespace minke
