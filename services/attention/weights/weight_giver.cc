#include "services/attention/weights/weight_giver.h"

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/thread_name.h"

namespace minke::attention {
namespace {

absl::Status Differs(const char* what, const std::string& wanted, const std::string& here) {
  return absl::FailedPreconditionError(
      StrCat("weights of another ", what, ": wanted ", wanted, ", this node has ", here));
}

}  // namespace

WeightGiver::~WeightGiver() {
  stop_.store(true);
  std::thread last;
  {
    const MutexLock lock(mutex_);
    giving_ = true;  // nothing new begins
    last.swap(thread_);
  }
  if (last.joinable()) last.join();
}

absl::StatusOr<std::string> WeightGiver::Offer(const WeightsIdentity& wanted) {
  if (wanted.model_fingerprint != self_.model_fingerprint) {
    return Differs("model", wanted.model_fingerprint, self_.model_fingerprint);
  }
  if (wanted.precision != self_.precision) return Differs("precision", wanted.precision, self_.precision);
  if (self_.plan_checksum == 0) {
    return absl::FailedPreconditionError(
        "this node has no weights to give: it computes on a CPU, or as one of several ranks");
  }
  if (wanted.plan_checksum != self_.plan_checksum) {
    return Differs("layout", StrCat(wanted.plan_checksum), StrCat(self_.plan_checksum));
  }
  std::thread last;
  {
    const MutexLock lock(mutex_);
    if (giving_) return absl::UnavailableError("this node is giving its weights to another one");
    giving_ = true;
    last.swap(thread_);
  }
  if (last.joinable()) last.join();  // it has said that it is done
  absl::StatusOr<std::string> id = new_group_();
  const MutexLock lock(mutex_);
  if (!id.ok()) {
    giving_ = false;
    return id;
  }
  thread_ = std::thread([this, group = *id] {
    SetThreadName("weight-giver");
    const absl::Status given = give_(group, stop_);
    if (given.ok()) {
      log::Info("attention", "gave the weights to a new node");
    } else {
      log::Warning("attention", StrCat("giving the weights to a new node: ", given.message()));
    }
    const MutexLock done(mutex_);
    giving_ = false;
  });
  return id;
}

}  // namespace minke::attention
