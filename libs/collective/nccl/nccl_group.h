// DeviceCollective over NCCL. The library is loaded when the first of these functions is called, so that a
// program starts without it; FAILED_PRECONDITION then says what was looked for, as it does in a build that
// had no nccl.h.
//
// Communicators are non-blocking: no call waits longer than the deadline for another rank, be it for joining,
// for a call's launch, or for its end. A rank that waited in vain aborts its communicator, which ends what it
// has on the GPU.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/collective/device_collective.h"

namespace minke {

// A name for a new group, to be carried to all its ranks: opaque bytes.
absl::StatusOr<std::string> NewNcclGroupId();

// Joins the group as `rank` with the calling thread's current device. Returns when all `size` ranks have
// joined. `stop`: who sets it ends the waiting early, with CANCELLED; borrowed.
absl::StatusOr<std::unique_ptr<DeviceCollective>> JoinNcclGroup(const std::string& id, int rank, int size,
                                                                absl::Duration deadline,
                                                                const std::atomic<bool>* stop = nullptr);

// All ranks of a group in this process, rank r on GPU r. FAILED_PRECONDITION if there are not as many GPUs.
absl::StatusOr<std::vector<std::unique_ptr<DeviceCollective>>> MakeNcclGroup(
    int size, absl::Duration deadline = absl::Seconds(30));

}  // namespace minke
