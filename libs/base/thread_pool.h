// A few compute threads for short, frequent loops: no allocation and no lock per call, workers spin briefly
// and then sleep on a futex, so idle processes leave the cores to their neighbours.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace minke {

// Thread-compatible: one caller at a time.
class ThreadPool {
 public:
  // `threads` counts the caller: 1 runs everything inline. `niceness`: of the workers, for work that should
  // yield to others on this host.
  explicit ThreadPool(int threads, int niceness = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(i) once for every i in [0, n), on any thread, in any order; returns when all are done.
  // REQUIRES: body neither throws nor calls ParallelFor.
  void ParallelFor(int64_t n, absl::FunctionRef<void(int64_t)> body);

 private:
  void WorkerLoop(int niceness);
  bool RunOne();

  // generation << 32 | tasks not yet claimed. A successful claim proves that the generation's body is alive,
  // because its ParallelFor returns only when every claimed task is done.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  absl::FunctionRef<void(int64_t)>* body_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace minke
