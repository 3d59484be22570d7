#include "services/attention/layers/tensor_parallel_model.h"

#include <algorithm>

#include "libs/base/status.h"
#include "libs/base/thread_name.h"

namespace minke::attention {

absl::StatusOr<std::unique_ptr<AttentionModel>> TensorParallelModel::Load(int ranks, int threads,
                                                                          LoadRank load) {
  std::unique_ptr<TensorParallelModel> model(new TensorParallelModel);
  for (int index = 0; index < ranks; ++index) {
    Rank rank;
    rank.pool = std::make_unique<ThreadPool>(std::max(1, threads / ranks));
    MK_ASSIGN_OR_RETURN(rank.model, load(index, *rank.pool));
    model->ranks_.push_back(std::move(rank));
  }
  for (int rank = 1; rank < ranks; ++rank) {
    model->ranks_[rank].thread = std::thread([raw = model.get(), rank] { raw->RankLoop(rank); });
  }
  return model;
}

TensorParallelModel::~TensorParallelModel() {
  stop_.store(true);
  call_.fetch_add(1);
  call_.notify_all();
  for (Rank& rank : ranks_) {
    if (rank.thread.joinable()) rank.thread.join();
  }
}

void TensorParallelModel::RankLoop(int rank) {
  SetThreadName("tensor-rank");
  for (uint64_t seen = 0;;) {
    call_.wait(seen, std::memory_order_acquire);
    seen = call_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    (*body_)(*ranks_[rank].model);
    finished_.fetch_add(1, std::memory_order_release);
    finished_.notify_one();
  }
}

void TensorParallelModel::OnRanks(absl::FunctionRef<void(AttentionModel&)> body) {
  body_ = &body;
  finished_.store(0, std::memory_order_relaxed);
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  body(First());
  const int others = static_cast<int>(ranks_.size()) - 1;
  for (int done = finished_.load(std::memory_order_acquire); done < others;
       done = finished_.load(std::memory_order_acquire)) {
    finished_.wait(done, std::memory_order_acquire);
  }
}

int64_t TensorParallelModel::CacheBytesPerToken() const {
  return First().CacheBytesPerToken() * std::ssize(ranks_);
}

absl::Status TensorParallelModel::Prepare(const ModelLimits& limits) {
  ModelLimits of_rank = limits;
  of_rank.row_memory = nullptr;  // what one rank has on its GPU, the others need too
  for (Rank& rank : ranks_) MK_RETURN_IF_ERROR(rank.model->Prepare(of_rank));
  routed_.resize(limits.microbatches);
  return absl::OkStatus();
}

void TensorParallelModel::WritePage(int32_t layer, uint32_t page, const std::byte* latents) {
  OnRanks([&](AttentionModel& model) { model.WritePage(layer, page, latents); });
}

void TensorParallelModel::Embed(const Microbatch& batch) {
  OnRanks([&](AttentionModel& model) { model.Embed(batch); });
}

void TensorParallelModel::Attention(int32_t layer, const Microbatch& batch, std::byte* rows) {
  OnRanks([&](AttentionModel& model) { model.Attention(layer, batch, &model == &First() ? rows : nullptr); });
}

void TensorParallelModel::FeedForward(int32_t layer, const Microbatch& batch) {
  OnRanks([&](AttentionModel& model) { model.FeedForward(layer, batch); });
}

float* TensorParallelModel::RoutedTarget(const Microbatch& batch) {
  routed_[batch.index].assign(batch.size() * config().hidden_size, 0.0f);
  return routed_[batch.index].data();
}

void TensorParallelModel::AddRouted(const Microbatch& batch) {
  const std::vector<float>& sums = routed_[batch.index];
  OnRanks([&](AttentionModel& model) {
    float* x = model.RoutedTarget(batch);
    for (size_t i = 0; i < sums.size(); ++i) x[i] += sums[i];
    model.AddRouted(batch);
  });
}

void TensorParallelModel::Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) {
  First().Logits(batch, selected, logits);
}

}  // namespace minke::attention
