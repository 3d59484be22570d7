// One model computed by several ranks, each with its part of the heads and of the inner dimensions, all with
// the whole latent cache. Every rank makes every call on a thread of its own; results are the first one's.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/base/thread_pool.h"
#include "services/attention/layers/attention_model.h"

namespace minke::attention {

class TensorParallelModel final : public AttentionModel {
 public:
  // Loads a rank of the model, with its end of the ranks' group, computing with `pool`.
  using LoadRank =
      absl::FunctionRef<absl::StatusOr<std::unique_ptr<AttentionModel>>(int rank, ThreadPool& pool)>;
  // `threads`: of all ranks together. Ranks are loaded one after the other.
  static absl::StatusOr<std::unique_ptr<AttentionModel>> Load(int ranks, int threads, LoadRank load);
  ~TensorParallelModel() override;

  const ModelConfig& config() const override { return First().config(); }
  Precision precision() const override { return First().precision(); }
  int64_t CacheBytesPerToken() const override;  // of all ranks
  absl::Status Prepare(const ModelLimits& limits) override;
  int64_t cache_pages() const override { return First().cache_pages(); }
  void ReadPage(int32_t layer, uint32_t page, std::byte* latents) override {
    First().ReadPage(layer, page, latents);
  }
  void WritePage(int32_t layer, uint32_t page, const std::byte* latents) override;
  kernels::MlaForm FormOf(int64_t rows, int64_t position_begin) const override {
    return First().FormOf(rows, position_begin);
  }
  void Embed(const Microbatch& batch) override;
  void Attention(int32_t layer, const Microbatch& batch, std::byte* rows) override;
  void FeedForward(int32_t layer, const Microbatch& batch) override;
  float* RoutedTarget(const Microbatch& batch) override;
  void AddRouted(const Microbatch& batch) override;
  void Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) override;

 private:
  struct Rank {
    std::unique_ptr<ThreadPool> pool;
    std::unique_ptr<AttentionModel> model;
    std::thread thread;  // of all but the first, which computes on the caller's
  };

  TensorParallelModel() = default;
  AttentionModel& First() const { return *ranks_.front().model; }
  // body(rank's model) on every rank's thread; returns when all are done.
  void OnRanks(absl::FunctionRef<void(AttentionModel&)> body);
  void RankLoop(int rank);

  std::vector<Rank> ranks_;
  std::vector<std::vector<float>> routed_;  // by microbatch: [rows, hidden]
  // The call under way: raised when there is one, and how many ranks have finished it.
  alignas(64) std::atomic<uint64_t> call_{0};
  alignas(64) std::atomic<int> finished_{0};
  absl::FunctionRef<void(AttentionModel&)>* body_ = nullptr;
  std::atomic<bool> stop_{false};
};

}  // namespace minke::attention
