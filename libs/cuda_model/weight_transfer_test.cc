// The order of a transfer of weights, without a device: what the giver sends is what the receiver reads.
#include "libs/cuda_model/weight_transfer.h"

#include <numeric>
#include <set>

#include "gtest/gtest.h"
#include "libs/model/testing/testing_checkpoint.h"

namespace minke::cuda_model {
namespace {

// Writes the calls down, and may end them early. No data is touched.
class RecordingCollective final : public DeviceCollective {
 public:
  explicit RecordingCollective(int rank, int64_t calls_max = 1 << 20) : rank_(rank), calls_max_(calls_max) {}
  int rank() const override { return rank_; }
  int size() const override { return 2; }
  absl::Status AllReduceSum(float*, int64_t, const cuda::Stream&) override {
    return absl::InternalError("not in a transfer");
  }
  absl::Status Broadcast(void*, int64_t bytes, int root, const cuda::Stream&) override {
    EXPECT_EQ(root, 0);
    if (std::ssize(calls) == calls_max_) return absl::DeadlineExceededError("the other one is gone");
    calls.push_back(bytes);
    ++open;
    open_max = std::max(open_max, open);
    return absl::OkStatus();
  }
  absl::Status Wait(const cuda::Stream&) override {
    open = 0;
    return absl::OkStatus();
  }

  std::vector<int64_t> calls;  // bytes
  int64_t open = 0, open_max = 0;

 private:
  const int rank_;
  const int64_t calls_max_;
};

// Names and bytes of what is read, handed on.
class RecordingSource final : public WeightSource {
 public:
  explicit RecordingSource(WeightSource& to) : to_(to) {}
  absl::Status ReadPart(const std::string& name, std::span<const int64_t> shape, const MatrixPart& part,
                        DeviceBuffer& buffer, int64_t offset, const Stream& stream) override {
    reads.emplace_back(name, part.rows * part.columns * 2);
    return to_.ReadPart(name, shape, part, buffer, offset, stream);
  }
  absl::Status ReadF32(const std::string& name, int64_t count, DeviceBuffer& buffer,
                       const Stream& stream) override {
    reads.emplace_back(name, count * 4);
    return to_.ReadF32(name, count, buffer, stream);
  }
  std::vector<std::pair<std::string, int64_t>> reads;

 private:
  WeightSource& to_;
};

ModelConfig WithoutCompressedQueries() {
  ModelConfig config = testing_support::TinyConfig();
  config.q_lora_rank = 0;
  config.tie_word_embeddings = true;
  return config;
}

AttentionWeights Empty(const ModelConfig& config) {
  AttentionWeights weights;
  weights.config = config;
  weights.layers.resize(config.num_hidden_layers);
  return weights;
}

TEST(WeightTransfer, GiverSendsWhatTheReceiverReads) {
  for (const ModelConfig& config : {testing_support::TinyConfig(), WithoutCompressedQueries()}) {
    const std::vector<PlannedTensor> plan = PlanWeights(config, {});
    const Stream stream = Stream::Default();
    RecordingCollective giver(0), receiver(1);
    ASSERT_TRUE(SendWeights(plan, Empty(config), giver, stream).ok());
    AttentionWeights weights = Empty(config);
    BroadcastSource source(plan, receiver);
    RecordingSource recording(source);
    std::vector<int32_t> layers;
    const auto progress = [&](int32_t layer) { layers.push_back(layer); };
    ASSERT_TRUE(ReadPlanned(plan, recording, stream, weights, progress).ok());
    ASSERT_TRUE(source.Finish(stream).ok());
    EXPECT_EQ(giver.calls, receiver.calls);
    ASSERT_EQ(recording.reads.size(), plan.size());
    for (size_t i = 0; i < plan.size(); ++i) {
      EXPECT_EQ(recording.reads[i], std::make_pair(plan[i].name, plan[i].bytes));
      EXPECT_EQ(giver.calls[i], plan[i].bytes);
    }
    std::vector<int32_t> all(config.num_hidden_layers);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(layers, all);
    EXPECT_LE(giver.open_max, 64);  // a peer that goes is noticed
    EXPECT_EQ(giver.open, 0);
    EXPECT_EQ(receiver.open, 0);
  }
}

TEST(WeightTransfer, PeerThatGoesEndsBothSides) {
  const ModelConfig config = testing_support::TinyConfig();
  const std::vector<PlannedTensor> plan = PlanWeights(config, {});
  RecordingCollective giver(0, 10), receiver(1, 10);
  EXPECT_EQ(SendWeights(plan, Empty(config), giver, Stream::Default()).code(),
            absl::StatusCode::kDeadlineExceeded);
  AttentionWeights weights = Empty(config);
  BroadcastSource source(plan, receiver);
  EXPECT_EQ(ReadPlanned(plan, source, Stream::Default(), weights, [](int32_t) {}).code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(source.Finish(Stream::Default()).code(), absl::StatusCode::kInternal);
}

TEST(WeightTransfer, ReadOutOfOrderIsRefused) {
  const std::vector<PlannedTensor> plan = PlanWeights(testing_support::TinyConfig(), {});
  RecordingCollective receiver(1);
  BroadcastSource source(plan, receiver);
  DeviceBuffer buffer;
  const absl::Status status = source.ReadF32("model.norm.weight", 64, buffer, Stream::Default());
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(status.message().find("model.norm.weight"), status.message().npos) << status;
  EXPECT_NE(status.message().find("model.embed_tokens.weight"), status.message().npos) << status;
  EXPECT_TRUE(receiver.calls.empty());
}

TEST(WeightPlan, PartsOfAllRanksAreTheWhole) {
  const ModelConfig config = testing_support::TinyConfig();
  const std::vector<PlannedTensor> whole = PlanWeights(config, {}), first = PlanWeights(config, {0, 2}),
                                   second = PlanWeights(config, {1, 2});
  int64_t shared = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    ASSERT_EQ(first[i].name, whole[i].name);
    EXPECT_EQ(first[i].shape, whole[i].shape);
    if (first[i].bytes == whole[i].bytes) continue;  // both have all of it
    ++shared;
    EXPECT_EQ(first[i].bytes + second[i].bytes, whole[i].bytes) << whole[i].name;
    EXPECT_EQ(second[i].part.row_begin + second[i].part.rows, whole[i].shape[0]) << whole[i].name;
    EXPECT_EQ(second[i].part.column_begin + second[i].part.columns, whole[i].shape[1]) << whole[i].name;
  }
  EXPECT_EQ(shared, config.num_hidden_layers * 6);  // W_UQ, W_UKV, W_O, gate, up, down
}

TEST(WeightPlan, EveryTensorIsThereOnceAndHasItsPlace) {
  const ModelConfig config = testing_support::TinyConfig();
  std::set<std::string> names;
  AttentionWeights weights = Empty(config);
  const DeviceBuffer* last = nullptr;
  int64_t end = 0;
  for (const PlannedTensor& tensor : PlanWeights(config, {})) {
    EXPECT_TRUE(names.insert(tensor.name).second) << tensor.name;
    const DeviceBuffer* buffer = &tensor.BufferIn(weights);
    EXPECT_EQ(tensor.offset, buffer == last ? end : 0) << tensor.name;
    end = tensor.offset + tensor.bytes;
    EXPECT_LE(end, tensor.buffer_bytes);
    last = buffer;
  }
}

TEST(WeightPlan, ChecksumTellsModelsApart) {
  const uint64_t tiny = ChecksumOf(PlanWeights(testing_support::TinyConfig(), {}));
  EXPECT_EQ(tiny, ChecksumOf(PlanWeights(testing_support::TinyConfig(), {})));
  EXPECT_NE(tiny, ChecksumOf(PlanWeights(WithoutCompressedQueries(), {})));
  EXPECT_NE(tiny, ChecksumOf(PlanWeights(testing_support::TinyConfig(), {0, 2})));
}

}  // namespace
}  // namespace minke::cuda_model
