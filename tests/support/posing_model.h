// A CPU's model that poses as one on a device: its rows and sums are "on the device" of a host's row memory.
#pragma once

#include <memory>
#include <vector>

#include "libs/gpu_rows/testing/host_row_combiner.h"
#include "services/attention/layers/attention_model.h"

namespace minke::testing_support {

class PosingModel final : public attention::AttentionModel, private attention::RowsOnDevice {
 public:
  using Microbatch = attention::Microbatch;
  explicit PosingModel(std::unique_ptr<AttentionModel> model)
      : model_(std::move(model)), combiner_(model_->config().hidden_size, model_->precision()) {}

  const ModelConfig& config() const override { return model_->config(); }
  Precision precision() const override { return model_->precision(); }
  int64_t CacheBytesPerToken() const override { return model_->CacheBytesPerToken(); }
  absl::Status Prepare(const attention::ModelLimits& limits) override {
    there_ = limits.row_memory != nullptr;
    rows_.resize(limits.microbatches);
    sums_.resize(limits.microbatches);
    return model_->Prepare(limits);
  }
  int64_t cache_pages() const override { return model_->cache_pages(); }
  void ReadPage(int32_t layer, uint32_t page, std::byte* latents) override {
    model_->ReadPage(layer, page, latents);
  }
  void WritePage(int32_t layer, uint32_t page, const std::byte* latents) override {
    model_->WritePage(layer, page, latents);
  }
  kernels::MlaForm FormOf(int64_t rows, int64_t position_begin) const override {
    return model_->FormOf(rows, position_begin);
  }
  void Embed(const Microbatch& batch) override { model_->Embed(batch); }
  void Attention(int32_t layer, const Microbatch& batch, std::byte* rows) override {
    model_->Attention(layer, batch, rows);
  }
  void FeedForward(int32_t layer, const Microbatch& batch) override { model_->FeedForward(layer, batch); }
  float* RoutedTarget(const Microbatch& batch) override { return model_->RoutedTarget(batch); }
  void AddRouted(const Microbatch& batch) override { model_->AddRouted(batch); }
  void Logits(const Microbatch& batch, std::span<const int32_t> selected, float* logits) override {
    model_->Logits(batch, selected, logits);
  }

  RowsOnDevice* on_device() override { return there_ ? this : nullptr; }
  const std::byte* AttentionRows(int32_t layer, const Microbatch& batch) override {
    std::vector<std::byte>& rows = rows_[batch.index];
    rows.resize(batch.size() * config().hidden_size * ActivationBytes(precision()));
    model_->Attention(layer, batch, rows.data());
    return rows.data();
  }
  float* DeviceSums(const Microbatch& batch) override {
    sums_[batch.index].resize(batch.size() * config().hidden_size);
    return sums_[batch.index].data();
  }
  void AddDeviceSums(const Microbatch& batch) override {
    float* x = model_->RoutedTarget(batch);
    for (const float sum : sums_[batch.index]) *x++ += sum;
    model_->AddRouted(batch);
  }
  RowCombiner& combiner() override { return combiner_; }

 private:
  const std::unique_ptr<AttentionModel> model_;
  HostRowCombiner combiner_;
  bool there_ = false;
  std::vector<std::vector<std::byte>> rows_;  // by microbatch
  std::vector<std::vector<float>> sums_;
};

}  // namespace minke::testing_support
