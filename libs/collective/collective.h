// Sums and copies among the ranks of a group that compute one model together: rank r of n holds the r-th part
// of the heads and of the inner dimensions, and what each computes of a row is added up (tensor parallelism).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace minke {

// One rank's end of a group. Used by one thread; every rank makes the same calls with the same sizes in the
// same order.
class Collective {
 public:
  virtual ~Collective() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // values of all ranks become their sum, added in the order of the ranks, so that all have the same bits.
  // DEADLINE_EXCEEDED if some rank does not come; the group is then of no more use.
  virtual absl::Status AllReduceSum(std::span<float> values) = 0;
  // bytes of all ranks become those of `root`.
  virtual absl::Status Broadcast(std::span<std::byte> bytes, int root) = 0;
};

}  // namespace minke
