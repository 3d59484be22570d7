// Work recorded once and launched again as a whole: one call for the hundreds of kernels of a step. And what
// goes with it: memory the copy engine reads without help, and order between streams.
#pragma once

#include <cstdint>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/kernels/cuda/device.h"

struct CUgraphExec_st;

namespace minke::cuda {

class Graph {
 public:
  // Records what `body` puts into `stream`, and into streams that wait for it meanwhile. Nothing runs.
  // Addresses and arguments are as at recording. `body` must not allocate, and must have run once before
  // (modules load lazily).
  static absl::StatusOr<Graph> Capture(const Stream& stream, absl::FunctionRef<absl::Status()> body);
  Graph(Graph&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Graph();
  absl::Status Launch(const Stream& stream) const;

 private:
  explicit Graph(CUgraphExec_st* handle) : handle_(handle) {}
  CUgraphExec_st* handle_;
};

// What `stream` does next waits for what was before `event`.
absl::Status Wait(const Stream& stream, const Event& event);

// Page-locked host memory: copies to and from it run beside the host. Reuse it only after they are done.
class PinnedBuffer {
 public:
  static absl::StatusOr<PinnedBuffer> Allocate(int64_t bytes);
  PinnedBuffer() = default;
  PinnedBuffer(PinnedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedBuffer();
  int64_t bytes() const { return bytes_; }
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  PinnedBuffer(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace minke::cuda
