#include "services/attention/weights/weight_giver.h"

#include <atomic>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/rpc/grpc_server.h"
#include "services/attention/api/weights_api.h"

namespace minke::attention {
namespace {

using ::testing::HasSubstr;

const WeightsIdentity kSelf = {.model_fingerprint = "aaaa", .precision = "bf16", .plan_checksum = 7};

absl::StatusOr<std::string> NewGroup() { return std::string("group"); }
absl::Status Given(const std::string&, const std::atomic<bool>&) { return absl::OkStatus(); }

// Until the last transfer's thread has said that it is done.
absl::StatusOr<std::string> OfferWhenFree(WeightGiver& giver) {
  for (int i = 0; i < 1000; ++i) {
    absl::StatusOr<std::string> id = giver.Offer(kSelf);
    if (!absl::IsUnavailable(id.status())) return id;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return absl::DeadlineExceededError("still giving");
}

TEST(WeightGiver, AnotherModelPrecisionOrLayoutIsRefusedNamingBoth) {
  WeightGiver giver(kSelf, NewGroup, Given);
  const auto refused = [&](WeightsIdentity wanted, const char* theirs, const char* ours) {
    const absl::Status status = giver.Offer(wanted).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), HasSubstr(theirs));
    EXPECT_THAT(std::string(status.message()), HasSubstr(ours));
  };
  refused({"bbbb", "bf16", 7}, "bbbb", "aaaa");
  refused({"aaaa", "exact", 7}, "exact", "bf16");
  refused({"aaaa", "bf16", 8}, "8", "7");
}

TEST(WeightGiver, NodeWithoutWeightsOnAGpuRefuses) {
  WeightGiver giver({.model_fingerprint = "aaaa", .precision = "bf16"}, NewGroup, Given);
  EXPECT_EQ(giver.Offer(kSelf).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(WeightGiver, GivesToOneAtATimeAndThenToTheNext) {
  absl::Notification go_on;
  std::atomic<int> given{0};
  WeightGiver giver(kSelf, NewGroup, [&](const std::string& group, const std::atomic<bool>&) {
    EXPECT_EQ(group, "group");
    go_on.WaitForNotification();
    ++given;
    return absl::OkStatus();
  });
  EXPECT_EQ(giver.Offer(kSelf).value(), "group");
  EXPECT_EQ(giver.Offer(kSelf).status().code(), absl::StatusCode::kUnavailable);
  go_on.Notify();
  EXPECT_TRUE(OfferWhenFree(giver).ok());
  EXPECT_TRUE(OfferWhenFree(giver).ok());
  EXPECT_GE(given.load(), 2);
}

TEST(WeightGiver, FailedTransferOrGroupDoesNotBlockTheNext) {
  int groups = 0;
  WeightGiver giver(
      kSelf,
      [&]() -> absl::StatusOr<std::string> {
        if (++groups == 2) return absl::InternalError("no group");
        return "group";
      },
      [](const std::string&, const std::atomic<bool>&) {
        return absl::DeadlineExceededError("nobody came");
      });
  EXPECT_TRUE(OfferWhenFree(giver).ok());
  EXPECT_EQ(OfferWhenFree(giver).status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(OfferWhenFree(giver).ok());
}

TEST(WeightGiver, EndsATransferUnderWayWhenItGoes) {
  std::atomic<bool> stopped{false};
  {
    WeightGiver giver(kSelf, NewGroup, [&](const std::string&, const std::atomic<bool>& stop) {
      while (!stop.load()) absl::SleepFor(absl::Milliseconds(1));
      stopped.store(true);
      return absl::CancelledError("given up");
    });
    EXPECT_TRUE(giver.Offer(kSelf).ok());
  }
  EXPECT_TRUE(stopped.load());
}

TEST(WeightsApi, OffersAndRefusalsCrossTheWire) {
  WeightGiver giver(kSelf, NewGroup, Given);
  WeightsApi api;
  api.SetGiver(&giver);
  const auto server = rpc::GrpcServer::Start("127.0.0.1:0", {&api});
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string address = "127.0.0.1:" + std::to_string((*server)->port());
  EXPECT_EQ(AskForWeights(address, kSelf, absl::Seconds(10)).value(), "group");
  const absl::Status other = AskForWeights(address, {"bbbb", "bf16", 7}, absl::Seconds(10)).status();
  EXPECT_EQ(other.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(other.message()), HasSubstr("bbbb"));
  (*server)->Shutdown(absl::Seconds(1));
  EXPECT_EQ(AskForWeights(address, kSelf, absl::Seconds(5)).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace minke::attention
