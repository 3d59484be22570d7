#include "libs/base/thread_pool.h"

#include <chrono>

#include "libs/base/status.h"
#include "libs/base/thread_name.h"

namespace minke {
namespace {

// Longer than the gap between two loops of one layer, shorter than a time slice.
constexpr std::chrono::microseconds kSpin{20};
// A pause takes 10 to 50 ns, depending on the CPU: the clock is looked at this often.
constexpr int kPauses = 64;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins until `done` or for kSpin; whether it is done.
template <class Done>
bool SpinUntil(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPauses; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

}  // namespace

ThreadPool::ThreadPool(int threads, int niceness) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, niceness] { WorkerLoop(niceness); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  state_.fetch_add(uint64_t{1} << 32);
  state_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::RunOne() {
  uint64_t state = state_.load(std::memory_order_acquire);
  while ((state & 0xffffffffu) != 0) {
    if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    const int64_t index = tasks_ - static_cast<int64_t>(state & 0xffffffffu);
    (*body_)(index);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }
  return false;
}

void ThreadPool::WorkerLoop(int niceness) {
  SetThreadName("compute");
  if (niceness != 0) YieldToOthers(niceness);
  while (true) {
    if (RunOne()) continue;
    const uint64_t seen = state_.load(std::memory_order_acquire);
    // After `seen`: whoever sees the state that the destructor leaves sees this too, and does not wait for a
    // change that never comes.
    if (stop_.load(std::memory_order_relaxed)) return;
    if ((seen & 0xffffffffu) != 0) continue;
    if (!SpinUntil([&] { return state_.load(std::memory_order_relaxed) != seen; }))
      state_.wait(seen, std::memory_order_acquire);
  }
}

void ThreadPool::ParallelFor(int64_t n, absl::FunctionRef<void(int64_t)> body) {
  if (n <= 0) return;
  if (workers_.empty() || n == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  MK_CHECK(n < (int64_t{1} << 32));
  body_ = &body;
  tasks_ = n;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t generation = (state_.load(std::memory_order_relaxed) >> 32) + 1;
  state_.store(generation << 32 | static_cast<uint64_t>(n), std::memory_order_release);
  state_.notify_all();
  while (RunOne()) {
  }
  const auto all_done = [&] { return done_.load(std::memory_order_acquire) == n; };
  if (SpinUntil(all_done)) return;
  // A worker that was preempted in the middle of a task needs the core we are spinning on.
  while (!all_done()) std::this_thread::yield();
}

}  // namespace minke
