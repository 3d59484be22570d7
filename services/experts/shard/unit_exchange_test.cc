// Two servers that hand a unit over, each with an engine of its own, over inproc transports.
#include "services/experts/shard/unit_exchange.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/transport/faulty/faulty.h"
#include "libs/transport/inproc/inproc.h"
#include "libs/wire/messages.h"
#include "services/experts/shard/unit_sources.h"

namespace minke::experts {
namespace {

constexpr UnitId kUnit{7, 3};
constexpr uint64_t kLayout = 99;

struct FakeUnit final : UnitWeights {
  explicit FakeUnit(int64_t size) : content(size) {}
  int64_t bytes() const override { return std::ssize(content); }
  absl::Status Read(int64_t begin, std::span<std::byte> out) const override {
    std::memcpy(out.data(), content.data() + begin, out.size());
    return absl::OkStatus();
  }
  std::vector<std::byte> content;
};

struct FakeBuilder final : UnitBuilder {
  explicit FakeBuilder(int64_t size) : unit(std::make_shared<FakeUnit>(size)), writes(size) {}
  int64_t bytes() const override { return unit->bytes(); }
  absl::Status Write(int64_t begin, std::span<const std::byte> bytes) override {
    std::memcpy(unit->content.data() + begin, bytes.data(), bytes.size());
    for (size_t i = 0; i < bytes.size(); ++i) ++writes[begin + i];
    return absl::OkStatus();
  }
  absl::StatusOr<std::shared_ptr<const UnitWeights>> Finish() override { return unit; }
  std::shared_ptr<FakeUnit> unit;
  std::vector<uint8_t> writes;
};

std::shared_ptr<FakeUnit> RandomUnit(int64_t size) {
  auto unit = std::make_shared<FakeUnit>(size);
  std::mt19937_64 random(static_cast<uint64_t>(size));
  for (std::byte& byte : unit->content) byte = static_cast<std::byte>(random());
  return unit;
}

class Server {
 public:
  Server(transport::InprocHub& hub, uint64_t id, std::optional<transport::FaultOptions> faults = {},
         UnitExchangeOptions options = {})
      : transport_(transport::CreateInproc(hub, {.node_id = NodeId{id}, .role = 4})) {
    if (faults) transport_ = std::make_unique<transport::FaultyTransport>(std::move(transport_), *faults);
    exchange_ = std::make_unique<UnitExchange>(options, *transport_);
  }
  ~Server() { Stop(); }
  void Start() {
    engine_ = std::thread([this] {
      while (!stop_.load()) {
        transport_->Poll([&](transport::Event& event) {
          if (event.kind == transport::Event::Kind::kFrame) exchange_->OnFrame(event.peer, event.frame);
          if (event.kind == transport::Event::Kind::kPeerUp) exchange_->OnPeerUp(event.peer);
          if (event.kind == transport::Event::Kind::kPeerLost) {
            ++lost;
            exchange_->OnPeerLost(event.peer);
          }
        });
        EXPECT_TRUE(exchange_
                        ->Tick(
                            units, [](UnitId) { return kLayout; }, busy.load())
                        .ok());
        if (!exchange_->Due()) transport_->Wait(absl::Milliseconds(5));
      }
    });
  }
  void Stop() {
    stop_.store(true);
    transport_->Wake();
    if (engine_.joinable()) engine_.join();
  }
  UnitExchange& exchange() { return *exchange_; }
  UnitExchange::Giver giver() const { return {transport_->self(), transport_->address()}; }

  Units units;  // before Start
  std::atomic<bool> busy{false};
  std::atomic<int> lost{0};

 private:
  std::unique_ptr<transport::Transport> transport_;
  std::unique_ptr<UnitExchange> exchange_;
  std::atomic<bool> stop_{false};
  std::thread engine_;
};

class UnitExchangeSizes : public testing::TestWithParam<int64_t> {};

TEST_P(UnitExchangeSizes, EveryByteComesOnce) {
  transport::InprocHub hub;
  Server giver(hub, 1), fetcher(hub, 2, {}, {.linger = absl::ZeroDuration()});
  const auto unit = RandomUnit(GetParam());
  giver.units[kUnit] = unit;
  giver.Start();
  fetcher.Start();
  FakeBuilder builder(GetParam());
  ASSERT_TRUE(fetcher.exchange().Fetch(kUnit, kLayout, giver.giver(), builder).ok());
  EXPECT_EQ(builder.unit->content, unit->content);
  EXPECT_EQ(builder.writes, std::vector<uint8_t>(GetParam(), 1));
  EXPECT_EQ(fetcher.exchange().counters().bytes_fetched, static_cast<uint64_t>(GetParam()));
  EXPECT_EQ(fetcher.lost, 0);
  fetcher.exchange().Rest();
  for (int i = 0; i < 5000 && giver.lost == 0; ++i) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(giver.lost, 1) << "the connection was made for the fetch only";
  EXPECT_EQ(giver.exchange().counters().bytes_given, static_cast<uint64_t>(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Sizes, UnitExchangeSizes,
                         testing::Values(1, wire::kUnitPieceBytes - 1, wire::kUnitPieceBytes,
                                         wire::kUnitPieceBytes + 1, 9 * wire::kUnitPieceBytes,
                                         100 * int64_t{wire::kUnitPieceBytes} + 77));

TEST(UnitExchange, ComesOverALossyNetwork) {
  transport::InprocHub hub;
  const transport::FaultOptions faults{.seed = 3,
                                       .drop_probability = 0.1,
                                       .duplicate_probability = 0.1,
                                       .delay_probability = 0.1,
                                       .reorder_probability = 0.2};
  Server giver(hub, 1, faults), fetcher(hub, 2, faults, {.ask_again = absl::Milliseconds(20)});
  const auto unit = RandomUnit(60 * int64_t{wire::kUnitPieceBytes} + 5);
  giver.units[kUnit] = unit;
  giver.Start();
  fetcher.Start();
  for (int i = 0; i < 3; ++i) {  // pieces of the one before arrive late
    FakeBuilder builder(unit->bytes());
    const absl::Status fetched = fetcher.exchange().Fetch(kUnit, kLayout, giver.giver(), builder);
    ASSERT_TRUE(fetched.ok()) << fetched;
    EXPECT_EQ(builder.unit->content, unit->content);
    EXPECT_EQ(builder.writes, std::vector<uint8_t>(unit->bytes(), 1));
  }
}

TEST(UnitExchange, ComesFromABusyServer) {
  transport::InprocHub hub;
  Server giver(hub, 1), fetcher(hub, 2);
  const auto unit = RandomUnit(40 * int64_t{wire::kUnitPieceBytes});
  giver.units[kUnit] = unit;
  giver.busy = true;
  giver.Start();
  fetcher.Start();
  FakeBuilder builder(unit->bytes());
  ASSERT_TRUE(fetcher.exchange().Fetch(kUnit, kLayout, giver.giver(), builder).ok());
  EXPECT_EQ(builder.unit->content, unit->content);
}

TEST(UnitExchange, BothWaysAtOnce) {
  transport::InprocHub hub;
  const UnitExchangeOptions options{.linger = absl::Milliseconds(100)};
  Server a(hub, 1, {}, options), b(hub, 2, {}, options);
  const auto unit_a = RandomUnit(50 * int64_t{wire::kUnitPieceBytes});
  const auto unit_b = RandomUnit(50 * int64_t{wire::kUnitPieceBytes} + 1);
  a.units[{1, 1}] = unit_a;
  b.units[{1, 2}] = unit_b;
  a.Start();
  b.Start();
  FakeBuilder builder_a(unit_a->bytes()), builder_b(unit_b->bytes());
  std::thread other([&] { EXPECT_TRUE(b.exchange().Fetch({1, 1}, kLayout, a.giver(), builder_a).ok()); });
  EXPECT_TRUE(a.exchange().Fetch({1, 2}, kLayout, b.giver(), builder_b).ok());
  a.exchange().Rest();  // the other one may not be through
  other.join();
  EXPECT_EQ(builder_a.unit->content, unit_a->content);
  EXPECT_EQ(builder_b.unit->content, unit_b->content);
}

TEST(UnitExchange, WhatIsNotThereOrPackedOtherwiseIsRefusedAtOnce) {
  transport::InprocHub hub;
  Server giver(hub, 1), fetcher(hub, 2);
  giver.units[kUnit] = RandomUnit(100);
  giver.Start();
  fetcher.Start();
  FakeBuilder builder(100);
  EXPECT_TRUE(absl::IsNotFound(fetcher.exchange().Fetch({7, 4}, kLayout, giver.giver(), builder)));
  EXPECT_TRUE(absl::IsNotFound(fetcher.exchange().Fetch(kUnit, kLayout + 1, giver.giver(), builder)));
  EXPECT_TRUE(fetcher.exchange().Fetch(kUnit, kLayout, giver.giver(), builder).ok());
}

TEST(UnitExchange, AGiverOfAnotherSizeIsNotBelieved) {
  transport::InprocHub hub;
  Server giver(hub, 1), fetcher(hub, 2, {}, {.ask_again = absl::Milliseconds(10), .stall = absl::Seconds(1)});
  giver.units[kUnit] = RandomUnit(101);
  giver.Start();
  fetcher.Start();
  FakeBuilder builder(100);
  EXPECT_TRUE(absl::IsDeadlineExceeded(fetcher.exchange().Fetch(kUnit, kLayout, giver.giver(), builder)));
  EXPECT_GT(fetcher.exchange().counters().bad_frames, 0u);
  EXPECT_EQ(builder.writes, std::vector<uint8_t>(100, 0));
}

TEST(UnitExchange, AGiverThatGoesOrNeverCameIsAnError) {
  transport::InprocHub hub;
  auto giver = std::make_unique<Server>(hub, 1);
  Server fetcher(hub, 2, {}, {.stall = absl::Milliseconds(300)});
  fetcher.Start();
  FakeBuilder builder(1 << 20);
  const auto gone_or_late = [](const absl::Status& status) {
    return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);  // whichever is noticed first
  };
  EXPECT_PRED1(gone_or_late,
               (fetcher.exchange().Fetch(kUnit, kLayout, {NodeId{5}, "inproc:0000000000000005"}, builder)));
  const UnitExchange::Giver address = giver->giver();
  giver->units[kUnit] = RandomUnit(1 << 20);
  // It connects, and is gone before it gives.
  std::thread gone([&] {
    absl::SleepFor(absl::Milliseconds(50));
    giver.reset();
  });
  const absl::Status status = fetcher.exchange().Fetch(kUnit, kLayout, address, builder);
  EXPECT_TRUE(gone_or_late(status)) << status;
  gone.join();
}

TEST(UnitExchange, StopEndsAFetch) {
  transport::InprocHub hub;
  Server giver(hub, 1), fetcher(hub, 2);  // the giver's engine does not run
  fetcher.Start();
  std::thread stopper([&] {
    absl::SleepFor(absl::Milliseconds(50));
    fetcher.exchange().Stop();
  });
  FakeBuilder builder(100);
  EXPECT_TRUE(absl::IsCancelled(fetcher.exchange().Fetch(kUnit, kLayout, giver.giver(), builder)));
  EXPECT_TRUE(absl::IsCancelled(fetcher.exchange().Fetch(kUnit, kLayout, giver.giver(), builder)));
  stopper.join();
}

TEST(UnitSources, TakesWhatProvesFasterAndLooksAgainNowAndThen) {
  UnitSources sources;
  EXPECT_EQ(sources.Choose(false), UnitSource::kCheckpoint);
  EXPECT_EQ(sources.Choose(true), UnitSource::kReplica);  // to know
  sources.Record(UnitSource::kReplica, 1000, absl::Seconds(1));
  EXPECT_EQ(sources.Choose(true), UnitSource::kCheckpoint);
  sources.Record(UnitSource::kCheckpoint, 500, absl::Seconds(1));
  int replica = 0;
  for (int i = 0; i < 64; ++i) replica += sources.Choose(true) == UnitSource::kReplica;
  EXPECT_EQ(replica, 62);
  sources.Record(UnitSource::kCheckpoint, 4500, absl::Seconds(1));  // mean 2500
  int checkpoint = 0;
  for (int i = 0; i < 64; ++i) checkpoint += sources.Choose(true) == UnitSource::kCheckpoint;
  EXPECT_EQ(checkpoint, 62);
  sources.Record(UnitSource::kReplica, 0, absl::Seconds(3));  // failed
  EXPECT_EQ(sources.bytes_per_s(UnitSource::kReplica), 0);
}

TEST(UnitSources, AFlagDecides) {
  UnitSources checkpoint(LoadFrom::kCheckpoint), replica(LoadFrom::kReplica);
  EXPECT_EQ(checkpoint.Choose(true), UnitSource::kCheckpoint);
  EXPECT_EQ(replica.Choose(true), UnitSource::kReplica);
  replica.Record(UnitSource::kReplica, 0, absl::Seconds(1));
  EXPECT_EQ(replica.Choose(true), UnitSource::kReplica);
  EXPECT_EQ(replica.Choose(false), UnitSource::kCheckpoint);
}

}  // namespace
}  // namespace minke::experts
