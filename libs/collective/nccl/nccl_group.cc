#include "libs/collective/nccl/nccl_group.h"

#include <cstring>
#include <thread>

#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/collective/nccl/nccl_library.h"
#include "libs/kernels/cuda/device.h"

namespace minke {
namespace {

absl::Status ToStatus(const NcclLibrary& nccl, ncclResult_t code, const char* call) {
  if (code == ncclSuccess) return absl::OkStatus();
  const std::string message = StrCat(call, ": ", nccl.GetErrorString(code));
  return code == ncclRemoteError ? absl::UnavailableError(message) : absl::InternalError(message);
}

class NcclCollective final : public DeviceCollective {
 public:
  NcclCollective(const NcclLibrary& nccl, int rank, int size, absl::Duration deadline,
                 const std::atomic<bool>* stop)
      : nccl_(nccl), rank_(rank), size_(size), deadline_(deadline), stop_(stop) {}
  NcclCollective(const NcclCollective&) = delete;

  ~NcclCollective() override {
    if (comm_ == nullptr) return;
    // Finalize waits, within the deadline, until peers have what was sent to them; Abort would cut them off.
    if (Started(nccl_.CommFinalize(comm_), "ncclCommFinalize").ok()) (void)nccl_.CommDestroy(comm_);
  }

  absl::Status Join(const ncclUniqueId& id) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    return Started(nccl_.CommInitRankConfig(&comm_, size_, id, rank_, &config), "ncclCommInitRank");
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  absl::Status AllReduceSum(float* values, int64_t count, const cuda::Stream& stream) override {
    MK_RETURN_IF_ERROR(Usable());
    return Started(nccl_.AllReduce(values, values, static_cast<size_t>(count), ncclFloat32, ncclSum, comm_,
                                   stream.handle()),
                   "ncclAllReduce");
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root, const cuda::Stream& stream) override {
    MK_RETURN_IF_ERROR(Usable());
    return Started(
        nccl_.Broadcast(data, data, static_cast<size_t>(bytes), ncclInt8, root, comm_, stream.handle()),
        "ncclBroadcast");
  }

  absl::Status Wait(const cuda::Stream& stream) override {
    MK_RETURN_IF_ERROR(Usable());
    const absl::Time end = absl::Now() + deadline_;
    for (int64_t polls = 1;; ++polls) {
      MK_ASSIGN_OR_RETURN(const bool done, stream.Done());
      if (done) return absl::OkStatus();
      if (polls % kPollsPerLook != 0) continue;
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = nccl_.CommGetAsyncError(comm_, &state);
      if (asked == ncclSuccess && state != ncclSuccess && state != ncclInProgress) {
        return Abort(ToStatus(nccl_, state, "a collective call"));
      }
      if (absl::Status over = Over(end, "a collective call"); !over.ok()) return Abort(over);
    }
  }

 private:
  // A look at the clock and at the communicator per this many looks at the stream, which take about 1 us.
  static constexpr int64_t kPollsPerLook = 64;

  absl::Status Usable() const {
    return comm_ != nullptr ? absl::OkStatus()
                            : absl::FailedPreconditionError("this NCCL communicator was given up");
  }
  // Whether the waiting has to end.
  absl::Status Over(absl::Time end, const char* call) const {
    if (stop_ != nullptr && stop_->load()) return absl::CancelledError(StrCat(call, ": given up"));
    if (absl::Now() <= end) return absl::OkStatus();
    return absl::DeadlineExceededError(StrCat(call, ": rank ", rank_, " of ", size_,
                                              " waited in vain for the others, ",
                                              absl::ToInt64Milliseconds(deadline_), " ms"));
  }
  absl::Status Abort(const absl::Status& why) {
    if (comm_ != nullptr) (void)nccl_.CommAbort(comm_);
    comm_ = nullptr;
    return why;
  }

  // A call of a non-blocking communicator has been made in the stream's order only when it is no longer "in
  // progress".
  absl::Status Started(ncclResult_t code, const char* call) {
    const absl::Time end = absl::Now() + deadline_;
    for (int64_t polls = 1; code == ncclInProgress; ++polls) {
      if (const ncclResult_t asked = nccl_.CommGetAsyncError(comm_, &code); asked != ncclSuccess)
        code = asked;
      if (code != ncclInProgress || polls % kPollsPerLook != 0) continue;
      if (absl::Status over = Over(end, call); !over.ok()) return Abort(over);
      std::this_thread::yield();
    }
    const absl::Status status = ToStatus(nccl_, code, call);
    return status.ok() ? status : Abort(status);
  }

  const NcclLibrary& nccl_;
  const int rank_, size_;
  const absl::Duration deadline_;
  const std::atomic<bool>* const stop_;
  ncclComm_t comm_ = nullptr;
};

}  // namespace

absl::StatusOr<std::string> NewNcclGroupId() {
  MK_ASSIGN_OR_RETURN(const NcclLibrary* const nccl, NcclLibrary::Get());
  ncclUniqueId id;
  MK_RETURN_IF_ERROR(ToStatus(*nccl, nccl->GetUniqueId(&id), "ncclGetUniqueId"));
  return std::string(id.internal, sizeof(id.internal));
}

absl::StatusOr<std::unique_ptr<DeviceCollective>> JoinNcclGroup(const std::string& id, int rank, int size,
                                                                absl::Duration deadline,
                                                                const std::atomic<bool>* stop) {
  MK_ASSIGN_OR_RETURN(const NcclLibrary* const nccl, NcclLibrary::Get());
  ncclUniqueId name;
  if (id.size() != sizeof(name.internal)) {
    return absl::InvalidArgumentError(
        StrCat("the id of an NCCL group: expected ", sizeof(name.internal), " bytes, found ", id.size()));
  }
  std::memcpy(name.internal, id.data(), id.size());
  auto made = std::make_unique<NcclCollective>(*nccl, rank, size, deadline, stop);
  MK_RETURN_IF_ERROR(made->Join(name));
  return made;
}

absl::StatusOr<std::vector<std::unique_ptr<DeviceCollective>>> MakeNcclGroup(int size,
                                                                             absl::Duration deadline) {
  MK_ASSIGN_OR_RETURN(const int devices, cuda::DeviceCount());
  if (devices < size) {
    return absl::FailedPreconditionError(StrCat(size, " ranks need a GPU each, this process sees ", devices));
  }
  MK_ASSIGN_OR_RETURN(const std::string id, NewNcclGroupId());
  std::vector<absl::StatusOr<std::unique_ptr<DeviceCollective>>> joined(size);
  {
    std::vector<std::jthread> threads;  // joining waits for the others
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        const absl::StatusOr<cuda::DeviceScope> device = cuda::DeviceScope::Enter(rank);
        joined[rank] = device.ok() ? JoinNcclGroup(id, rank, size, deadline) : device.status();
      });
    }
  }
  std::vector<std::unique_ptr<DeviceCollective>> group;
  for (auto& rank : joined) {
    MK_RETURN_IF_ERROR(rank.status());
    group.push_back(*std::move(rank));
  }
  return group;
}

}  // namespace minke
