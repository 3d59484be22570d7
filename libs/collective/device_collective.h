// The same as Collective, for ranks that compute on a GPU each: calls put work into a stream and return
// before it is done.
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace minke::cuda {
class Stream;
}

namespace minke {

// One rank's end of a group. Used by one thread at a time, with the rank's GPU as its current device; every
// rank makes the same calls with the same sizes in the same order. After an error the group is of no more
// use.
class DeviceCollective {
 public:
  virtual ~DeviceCollective() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // values [count] of all ranks, in device memory, become their sum: the same bits on all ranks.
  virtual absl::Status AllReduceSum(float* values, int64_t count, const cuda::Stream& stream) = 0;
  // data [bytes] of all ranks, in device memory, becomes that of `root`.
  virtual absl::Status Broadcast(void* data, int64_t bytes, int root, const cuda::Stream& stream) = 0;
  // Waits for all that is in the stream: what Stream::Synchronize does, which would wait for ever for a rank
  // that never comes. DEADLINE_EXCEEDED then.
  virtual absl::Status Wait(const cuda::Stream& stream) = 0;
};

}  // namespace minke
