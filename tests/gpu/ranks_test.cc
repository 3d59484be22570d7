// Collective calls between GPUs, and an attention node's part of the model shared out to several ranks. On
// one GPU: groups of one over NCCL, and several ranks on the same GPU that meet in host memory, which tests
// the shares. On two: NCCL between them.
#include <cuda_runtime_api.h>

#include <numeric>
#include <thread>

#include "absl/time/clock.h"
#include "libs/collective/local_group.h"
#include "libs/collective/nccl/nccl_group.h"
#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/cuda_model/weight_transfer.h"
#include "libs/model/checkpoint.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "tests/gpu/gpu_support.h"
#include "tests/gpu/small_attention.h"
#include "tests/gpu/stack_configs.h"

namespace minke::cuda_model {
namespace {

using cuda::testing_support::ToDevice;
using cuda::testing_support::ToHost;

#define SKIP_WITHOUT_NCCL(group_or)                                                       \
  if ((group_or).status().code() == absl::StatusCode::kFailedPrecondition) {              \
    GTEST_SKIP() << std::string((group_or).status().message()) << ": nothing was tested"; \
  }                                                                                       \
  ASSERT_TRUE((group_or).ok()) << (group_or).status()

// Ranks that meet in host memory, so that several may share a GPU.
class HostCollective final : public DeviceCollective {
 public:
  explicit HostCollective(std::unique_ptr<Collective> group) : group_(std::move(group)) {}
  int rank() const override { return group_->rank(); }
  int size() const override { return group_->size(); }
  absl::Status AllReduceSum(float* values, int64_t count, const Stream& stream) override {
    std::vector<float> host(count);
    Copy(host.data(), values, count * 4, stream);
    if (absl::Status status = group_->AllReduceSum(host); !status.ok()) return status;
    Copy(values, host.data(), count * 4, stream);
    return absl::OkStatus();
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root, const Stream& stream) override {
    std::vector<std::byte> host(bytes);
    Copy(host.data(), data, bytes, stream);
    if (absl::Status status = group_->Broadcast(host, root); !status.ok()) return status;
    Copy(data, host.data(), bytes, stream);
    return absl::OkStatus();
  }
  absl::Status Wait(const Stream& stream) override { return stream.Synchronize(); }

 private:
  static void Copy(void* to, const void* from, int64_t bytes, const Stream& stream) {
    EXPECT_EQ(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream.handle()),
              cudaSuccess);
    EXPECT_TRUE(stream.Synchronize().ok());
  }
  const std::unique_ptr<Collective> group_;
};

TEST(NcclGroup, RankThatNeverJoinsIsNotWaitedForForever) {
  const absl::StatusOr<std::string> id = NewNcclGroupId();
  SKIP_WITHOUT_NCCL(id);
  const absl::Time begin = absl::Now();
  const auto joined = JoinNcclGroup(*id, 0, 2, absl::Seconds(2));
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kDeadlineExceeded) << joined.status();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(20));
}

TEST(NcclGroup, MoreRanksThanGpusAreRefused) {
  const int gpus = cuda::DeviceCount().value();
  const auto group = MakeNcclGroup(gpus + 1);
  EXPECT_EQ(group.status().code(), absl::StatusCode::kFailedPrecondition) << group.status();
}

TEST(NcclGroup, IdOfAnotherLengthIsRefused) {
  SKIP_WITHOUT_NCCL(NewNcclGroupId());
  EXPECT_EQ(JoinNcclGroup("short", 0, 1, absl::Seconds(5)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(NcclGroup, GroupOfOneChangesNothing) {
  auto group = MakeNcclGroup(1);
  SKIP_WITHOUT_NCCL(group);
  const Stream stream = Stream::Create().value();
  std::vector<float> values(100003);
  std::iota(values.begin(), values.end(), -5e4f);
  const DeviceBuffer device = ToDevice(values, stream);
  DeviceCollective& rank = *(*group)[0];
  ASSERT_TRUE(rank.AllReduceSum(device.as<float>(), std::ssize(values), stream).ok());
  ASSERT_TRUE(rank.Broadcast(device.as(), device.bytes(), 0, stream).ok());
  ASSERT_TRUE(rank.Wait(stream).ok());
  EXPECT_EQ(ToHost<float>(device, stream), values);
}

TEST(NcclGroup, SumsAndCopiesBetweenTwoGpus) {
  if (cuda::DeviceCount().value() < 2) GTEST_SKIP() << "one GPU here; this needs two";
  auto group = MakeNcclGroup(2);
  SKIP_WITHOUT_NCCL(group);
  std::vector<std::vector<float>> sums(2);
  std::vector<std::vector<bf16>> copies(2);
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < 2; ++rank) {
      threads.emplace_back([&, rank] {
        const auto scope = cuda::DeviceScope::Enter(rank);
        ASSERT_TRUE(scope.ok()) << scope.status();
        const Stream stream = Stream::Create().value();
        std::mt19937 rng(rank);
        const std::vector<bf16> bytes = cuda::testing_support::RandomBF16(rng, 1 << 20);
        std::vector<float> values(100003);
        for (float& v : values) v = static_cast<float>(rng() % 1000) + rank;  // sums are exact
        const DeviceBuffer a = ToDevice(values, stream), b = ToDevice(bytes, stream);
        DeviceCollective& end = *(*group)[rank];
        ASSERT_TRUE(end.AllReduceSum(a.as<float>(), std::ssize(values), stream).ok());
        ASSERT_TRUE(end.Broadcast(b.as(), b.bytes(), 1, stream).ok());
        const absl::Status done = end.Wait(stream);
        ASSERT_TRUE(done.ok()) << done;
        sums[rank] = ToHost<float>(a, stream);
        copies[rank] = ToHost<bf16>(b, stream);
      });
    }
  }
  EXPECT_EQ(sums[0], sums[1]);
  EXPECT_EQ(copies[0], copies[1]);
  std::mt19937 rng0(0), rng1(1);
  (void)cuda::testing_support::RandomBF16(rng0, 1 << 20);
  EXPECT_EQ(copies[0], cuda::testing_support::RandomBF16(rng1, 1 << 20));
  for (const float sum : sums[0]) ASSERT_EQ(sum, static_cast<float>(rng0() % 1000 + rng1() % 1000 + 1));
}

TEST(NcclGroup, RankThatStaysAwayFromACallIsNotWaitedForForever) {
  if (cuda::DeviceCount().value() < 2) GTEST_SKIP() << "one GPU here; this needs two";
  auto group = MakeNcclGroup(2, absl::Seconds(3));
  SKIP_WITHOUT_NCCL(group);
  const Stream stream = Stream::Create().value();
  const DeviceBuffer values = ToDevice(std::vector<float>(1000, 1.0f), stream);
  absl::Status status = (*group)[0]->AllReduceSum(values.as<float>(), 1000, stream);
  if (status.ok()) status = (*group)[0]->Wait(stream);
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_EQ((*group)[0]->Wait(stream).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(stream.Synchronize().ok());  // what was on the GPU has ended
}

// One rank's logits of a few steps of three sequences: prompts, then decoding beside a prompt. In place of
// the routed experts: numbers that depend on layer and row only.
std::vector<float> LogitsOf(AttentionOnGpu& gpu) {
  AttentionOnGpu* const model = &gpu;
  const ModelConfig& config = model->config();
  const auto batch = model->MakeBatch().value();
  std::mt19937 rng(7);
  std::vector<std::vector<uint32_t>> tokens(3);
  const std::vector<std::vector<uint32_t>> pages = {{3, 0, 7}, {1, 9}, {5, 2}};
  for (auto& sequence : tokens) {
    for (int i = 0; i < 128; ++i) sequence.push_back(rng() % config.vocab_size);
  }
  struct Part {
    int sequence, begin, end;
  };
  const std::vector<std::vector<Part>> steps = {{{0, 0, 9}, {1, 0, 100}},
                                                {{0, 9, 10}, {1, 100, 101}, {2, 0, 90}},
                                                {{0, 10, 11}, {1, 101, 102}, {2, 90, 91}}};
  std::vector<float> all;
  for (std::vector<Part> parts : steps) {
    std::stable_partition(parts.begin(), parts.end(),
                          [&](const Part& p) { return model->Absorbed(p.end - p.begin, p.begin); });
    std::vector<GpuChunk> chunks;
    std::vector<int32_t> last;
    int32_t rows = 0;
    for (const Part& p : parts) {
      chunks.push_back(
          {std::span(tokens[p.sequence]).subspan(p.begin, p.end - p.begin), p.begin, pages[p.sequence]});
      last.push_back((rows += p.end - p.begin) - 1);
    }
    EXPECT_TRUE(model->Begin(*batch, chunks).ok());
    EXPECT_TRUE(model->Embed(*batch).ok());
    std::vector<int32_t> begin(rows + 1);
    std::iota(begin.begin(), begin.end(), 0);
    for (int32_t layer = 0; layer < config.num_hidden_layers; ++layer) {
      absl::Status status = model->Attention(layer, *batch);
      if (status.ok()) status = model->FeedForward(layer, *batch);
      if (status.ok() && config.IsMoeLayer(layer)) {
        std::mt19937 sums(layer);
        std::vector<float> partials(int64_t{rows} * config.hidden_size);
        for (float& v : partials) v = static_cast<float>(sums() % 2001) / 1000 - 1;
        status = model->AddPartials(*batch, begin, partials.data());
        if (status.ok()) status = model->Synchronize();
      }
      EXPECT_TRUE(status.ok()) << status;
      if (!status.ok()) return {};
    }
    EXPECT_TRUE(model->Logits(*batch, last).ok());
    const std::vector<float> logits = model->DownloadLogits(std::ssize(last)).value();
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

std::vector<float> RankLogits(const Checkpoint& checkpoint, kernels::Share share,
                              std::unique_ptr<DeviceCollective> group) {
  auto weights = WeightsFromDisk(checkpoint, share);
  EXPECT_TRUE(weights.ok()) << weights.status();
  return LogitsOf(*AttentionOnGpu::Create(*std::move(weights), SmallOptions(), std::move(group)).value());
}

// Every rank on a thread of its own, on `device(rank)`.
template <class Device>
std::vector<std::vector<float>> RanksLogits(const Checkpoint& checkpoint,
                                            std::vector<std::unique_ptr<DeviceCollective>> group,
                                            Device device) {
  const int ranks = static_cast<int>(group.size());
  std::vector<std::vector<float>> logits(ranks);
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto scope = cuda::DeviceScope::Enter(device(rank));
      ASSERT_TRUE(scope.ok()) << scope.status();
      logits[rank] = RankLogits(checkpoint, {rank, ranks}, std::move(group[rank]));
    });
  }
  threads.clear();
  return logits;
}

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += std::pow(double{got[i]} - want[i], 2), norm += std::pow(double{want[i]}, 2);
  }
  EXPECT_LE(std::sqrt(error / norm), 3e-2) << what;  // two orders of adding up bf16 products
  std::printf("%s: relative error %.5f\n", what.c_str(), std::sqrt(error / norm));
}

class AttentionRanks : public testing::TestWithParam<const char*> {
 protected:
  // V2: 128 heads and compressed queries. Lite: 16 heads, whose shares take the generic kernels. Odd: small
  // odd dimensions.
  void SetUp() override {
    const std::string shape = GetParam();
    const std::string config = shape == "V2"     ? testing_support::V2Config()
                               : shape == "Lite" ? testing_support::LiteConfig()
                                                 : testing_support::TinyConfigJson();
    ASSERT_TRUE(
        MakeCheckpoint({.directory = dir_.path() + "/model", .config_json = config, .seed = 5, .threads = 8})
            .ok());
    checkpoint_ = Checkpoint::Open(dir_.path() + "/model").value();
  }

  testing_support::TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
};
INSTANTIATE_TEST_SUITE_P(Shapes, AttentionRanks, testing::Values("V2", "Lite", "Odd"),
                         [](const auto& info) { return info.param; });

TEST_P(AttentionRanks, ShareThatDoesNotDivideIsRefused) {
  const Stream stream = Stream::Create().value();
  CheckpointSource source = CheckpointSource::Create(*checkpoint_).value();
  const auto weights = AttentionWeights::Load(checkpoint_->config(), source, stream, [](int32_t) {}, {0, 7});
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument) << weights.status();
}

TEST_P(AttentionRanks, GroupOfOneGivesTheSameBits) {
  auto group = MakeNcclGroup(1);
  SKIP_WITHOUT_NCCL(group);
  const std::vector<float> want = RankLogits(*checkpoint_, {}, nullptr);
  EXPECT_EQ(RankLogits(*checkpoint_, {0, 1}, std::move((*group)[0])), want);
}

TEST_P(AttentionRanks, SharesOnOneGpuAgreeWithTheWhole) {
  const std::vector<float> want = RankLogits(*checkpoint_, {}, nullptr);
  for (const int ranks : {2, 4}) {
    if (!CheckSupported(checkpoint_->config(), ranks).ok()) continue;
    std::vector<std::unique_ptr<DeviceCollective>> group;
    for (auto& end : MakeLocalGroup(ranks)) group.push_back(std::make_unique<HostCollective>(std::move(end)));
    const auto got = RanksLogits(*checkpoint_, std::move(group), [](int) { return 0; });
    for (int rank = 1; rank < ranks; ++rank) EXPECT_EQ(got[rank], got[0]) << "rank " << rank;
    ExpectNear(got[0], want, std::string(GetParam()) + ", " + std::to_string(ranks) + " ranks on one GPU");
  }
}

TEST_P(AttentionRanks, TwoGpusAgreeWithOne) {
  if (cuda::DeviceCount().value() < 2) GTEST_SKIP() << "one GPU here; this needs two";
  if (!CheckSupported(checkpoint_->config(), 2).ok()) GTEST_SKIP() << "cannot be shared out to two";
  auto group = MakeNcclGroup(2);
  SKIP_WITHOUT_NCCL(group);
  const std::vector<float> want = RankLogits(*checkpoint_, {}, nullptr);
  const auto got = RanksLogits(*checkpoint_, *std::move(group), [](int rank) { return rank; });
  EXPECT_EQ(got[1], got[0]);
  ExpectNear(got[0], want, std::string(GetParam()) + ", two GPUs");
}

// A model that serves gives its weights to one that has none.
void TransferBetween(const Checkpoint& checkpoint, std::vector<std::unique_ptr<DeviceCollective>> group,
                     int receiver_device) {
  const std::vector<PlannedTensor> plan = PlanWeights(checkpoint.config(), {});
  const auto giver = AttentionOnGpu::Create(WeightsFromDisk(checkpoint, {}).value(), SmallOptions()).value();
  const std::vector<float> want = LogitsOf(*giver);
  std::vector<float> got;
  {
    std::jthread sending([&] {
      const Stream stream = Stream::Create().value();
      const absl::Status sent = SendWeights(plan, giver->weights(), *group[0], stream);
      EXPECT_TRUE(sent.ok()) << sent;
    });
    std::jthread receiving([&] {
      const auto scope = cuda::DeviceScope::Enter(receiver_device);
      ASSERT_TRUE(scope.ok()) << scope.status();
      const Stream stream = Stream::Create().value();
      BroadcastSource source(plan, *group[1]);
      auto weights = AttentionWeights::Load(checkpoint.config(), source, stream, [](int32_t) {});
      ASSERT_TRUE(weights.ok()) << weights.status();
      got = LogitsOf(*AttentionOnGpu::Create(*std::move(weights), SmallOptions()).value());
    });
    EXPECT_EQ(LogitsOf(*giver), want);  // meanwhile
  }
  EXPECT_EQ(got, want);
}

TEST_P(AttentionRanks, WeightsOfARunningModelGiveTheSameBits) {
  std::vector<std::unique_ptr<DeviceCollective>> group;
  for (auto& end : MakeLocalGroup(2)) group.push_back(std::make_unique<HostCollective>(std::move(end)));
  TransferBetween(*checkpoint_, std::move(group), 0);
}

TEST_P(AttentionRanks, WeightsOfARunningModelCrossToAnotherGpu) {
  if (cuda::DeviceCount().value() < 2) GTEST_SKIP() << "one GPU here; this needs two";
  auto group = MakeNcclGroup(2);
  SKIP_WITHOUT_NCCL(group);
  TransferBetween(*checkpoint_, *std::move(group), 1);
}

TEST_P(AttentionRanks, WeightsSentToNobodyStayAsTheyAre) {
  auto group = MakeNcclGroup(1);
  SKIP_WITHOUT_NCCL(group);
  const auto model =
      AttentionOnGpu::Create(WeightsFromDisk(*checkpoint_, {}).value(), SmallOptions()).value();
  const std::vector<float> want = LogitsOf(*model);
  const Stream stream = Stream::Create().value();
  ASSERT_TRUE(
      SendWeights(PlanWeights(checkpoint_->config(), {}), model->weights(), *(*group)[0], stream).ok());
  EXPECT_EQ(LogitsOf(*model), want);
}

}  // namespace
}  // namespace minke::cuda_model
