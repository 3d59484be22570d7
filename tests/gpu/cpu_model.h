// The whole model on the CPU in bf16: the attention node's model, the router's gate and the experts, in one
// place. What the GPU must agree with.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "libs/kernels/cpu/grouped_ffn.h"
#include "libs/model/checkpoint.h"
#include "libs/model/tensors.h"
#include "services/attention/layers/cpu_attention_model.h"
#include "services/router/gating/cpu_gate.h"

namespace minke::testing_support {

class CpuModel {
 public:
  struct Chunk {
    std::vector<uint32_t> tokens;
    int64_t position_begin = 0;
    std::vector<uint32_t> pages;
  };
  // Experts that somebody else chose, [rows, k] by MoE layer.
  using Routing = std::map<int32_t, std::vector<int32_t>>;

  CpuModel(std::shared_ptr<const Checkpoint> checkpoint, int64_t pages)
      : pool_(static_cast<int>(std::min(16u, std::max(1u, std::thread::hardware_concurrency())))),
        config_(checkpoint->config()) {
    model_ = attention::CpuAttentionModel::Load(checkpoint, Precision::kBF16, attention::MlaChoice::kAuto,
                                                pool_, [](int32_t) {})
                 .value();
    EXPECT_TRUE(model_->Prepare({.cache_pages = pages}).ok());
    gate_ = router::CpuGate::Load(*checkpoint, Precision::kBF16, pool_).value();
    gate_->SetOverrideForTest([this](int32_t layer, uint32_t row, std::span<uint16_t> experts) {
      if (forced_ == nullptr) return false;
      for (size_t i = 0; i < experts.size(); ++i) {
        experts[i] = static_cast<uint16_t>(forced_->at(layer)[row * experts.size() + i]);
      }
      return true;
    });
    for (const int32_t layer : config_.MoeLayers()) {
      for (int32_t e = 0; e < config_.n_routed_experts; ++e) {
        experts_[layer].push_back(
            kernels::FfnWeights::Load(*checkpoint, ExpertPrefix(layer, e), config_.hidden_size,
                                      config_.moe_intermediate_size, Precision::kBF16, pool_)
                .value());
      }
      gates_[layer].resize(int64_t{config_.n_routed_experts} * config_.hidden_size);
      const int64_t shape[] = {config_.n_routed_experts, config_.hidden_size};
      checkpoint->Find(LayerPrefix(layer) + "mlp.gate.weight", shape)->Read(0, gates_[layer]);
    }
  }

  // Logits of every chunk's last row, the routed experts being those of `routing`. Where this model would
  // have routed differently, the choice must have been a near-tie.
  std::vector<float> Run(const std::vector<Chunk>& chunks, const Routing& routing) {
    attention::Microbatch batch;
    std::vector<int32_t> last;
    for (const Chunk& chunk : chunks) {
      kernels::MlaChunk mla;
      mla.row_begin = batch.size();
      mla.rows = std::ssize(chunk.tokens);
      mla.position_begin = chunk.position_begin;
      mla.pages = chunk.pages;
      mla.form = model_->FormOf(mla.rows, mla.position_begin);
      batch.chunks.push_back(mla);
      for (int64_t i = 0; i < mla.rows; ++i) {
        const int64_t position = chunk.position_begin + i;
        batch.rows.push_back({.token = chunk.tokens[i],
                              .page = chunk.pages[position / 64],
                              .page_slot = static_cast<uint32_t>(position % 64),
                              .position = position});
      }
      last.push_back(static_cast<int32_t>(batch.size() - 1));
    }
    std::vector<std::byte> normed(batch.size() * config_.hidden_size * sizeof(bf16));
    model_->Embed(batch);
    for (int32_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
      model_->Attention(layer, batch, normed.data());
      model_->FeedForward(layer, batch);
      if (config_.IsMoeLayer(layer)) Moe(layer, batch, normed.data(), routing);
    }
    std::vector<float> logits(last.size() * config_.vocab_size);
    model_->Logits(batch, last, logits.data());
    return logits;
  }

  // What expert servers would send back for these rows of a MoE layer: one partial each. Adds this gate's own
  // choice to `routing`.
  std::vector<bf16> Partials(int32_t layer, const std::vector<bf16>& normed, Routing& routing) {
    const int64_t rows = std::ssize(normed) / config_.hidden_size, k = config_.num_experts_per_tok;
    std::vector<uint16_t> chosen(rows * k);
    std::vector<float> weights(rows * k), sums(normed.size());
    std::vector<router::GateResult> results(rows);
    forced_ = nullptr;
    const auto* x = reinterpret_cast<const std::byte*>(normed.data());
    gate_->Route(layer, 0, x, rows, chosen.data(), weights.data(), results.data(), pool_);
    routing[layer].assign(chosen.begin(), chosen.end());
    AddExperts(layer, x, rows, chosen, weights, sums.data());
    std::vector<bf16> out(sums.size());
    std::transform(sums.begin(), sums.end(), out.begin(), F32ToBF16);
    return out;
  }

  int64_t routed_rows = 0, differently_routed_rows = 0;

 private:
  void Moe(int32_t layer, const attention::Microbatch& batch, const std::byte* normed,
           const Routing& routing) {
    const int64_t rows = batch.size(), k = config_.num_experts_per_tok, hidden = config_.hidden_size;
    std::vector<uint16_t> own(rows * k), chosen(rows * k);
    std::vector<float> weights(rows * k);
    std::vector<router::GateResult> results(rows);
    forced_ = nullptr;
    gate_->Route(layer, 0, normed, rows, own.data(), weights.data(), results.data(), pool_);
    forced_ = &routing;
    gate_->Route(layer, 0, normed, rows, chosen.data(), weights.data(), results.data(), pool_);
    routed_rows += rows;
    for (int64_t r = 0; r < rows; ++r) {
      if (std::equal(&own[r * k], &own[r * k] + k, &chosen[r * k])) continue;
      ++differently_routed_rows;
      EXPECT_LE(Margin(layer, reinterpret_cast<const bf16*>(normed) + r * hidden), 0.12)
          << "layer " << layer << ", row " << r << ": routed differently, and no near-tie";
    }
    AddExperts(layer, normed, rows, chosen, weights, model_->RoutedTarget(batch));
    model_->AddRouted(batch);
  }

  void AddExperts(int32_t layer, const std::byte* normed, int64_t rows, const std::vector<uint16_t>& chosen,
                  const std::vector<float>& weights, float* x) {
    const int64_t k = config_.num_experts_per_tok, hidden = config_.hidden_size;
    for (int32_t e = 0; e < config_.n_routed_experts; ++e) {  // experts ascending, as the sum is defined
      std::vector<std::pair<int64_t, float>> users;
      for (int64_t i = 0; i < rows * k; ++i) {
        if (chosen[i] == e) users.emplace_back(i / k, weights[i]);
      }
      if (users.empty()) continue;
      std::vector<bf16> in(users.size() * hidden);
      std::vector<float> y(in.size());
      for (size_t u = 0; u < users.size(); ++u) {
        std::copy_n(reinterpret_cast<const bf16*>(normed) + users[u].first * hidden, hidden, &in[u * hidden]);
      }
      const kernels::FfnRows item{&experts_[layer][e], 0, std::ssize(users)};
      kernels::GroupedFfn({&item, 1}, reinterpret_cast<const std::byte*>(in.data()), y.data(), scratch_,
                          pool_);
      for (size_t u = 0; u < users.size(); ++u) {
        float* to = x + users[u].first * hidden;
        for (int64_t i = 0; i < hidden; ++i) to[i] += users[u].second * y[u * hidden + i];
      }
    }
  }

  // By how much logits would have to change for another choice of groups or experts, in units of their
  // deviation.
  double Margin(int32_t layer, const bf16* x) const {
    const int32_t n = config_.n_routed_experts, hidden = config_.hidden_size;
    std::vector<double> logits(n);
    for (int32_t e = 0; e < n; ++e) {
      for (int32_t i = 0; i < hidden; ++i)
        logits[e] += double{BF16ToF32(x[i])} * gates_.at(layer)[int64_t{e} * hidden + i];
    }
    double margin = INFINITY;
    std::vector<double> candidates = logits;
    if (config_.topk_method == TopkMethod::kGroupLimitedGreedy) {
      const int32_t size = n / config_.n_group;
      std::vector<double> groups, sorted;
      for (int32_t g = 0; g < config_.n_group; ++g) {
        groups.push_back(*std::max_element(&logits[g * size], &logits[g * size] + size));
      }
      sorted = groups;
      std::sort(sorted.rbegin(), sorted.rend());
      margin = sorted[config_.topk_group - 1] - sorted[config_.topk_group];
      candidates.clear();
      for (int32_t e = 0; e < n; ++e) {
        if (groups[e / size] >= sorted[config_.topk_group - 1]) candidates.push_back(logits[e]);
      }
    }
    std::sort(candidates.rbegin(), candidates.rend());
    const int32_t k = config_.num_experts_per_tok;
    if (k < std::ssize(candidates)) margin = std::min(margin, candidates[k - 1] - candidates[k]);
    double square = 0;
    for (const double logit : logits) square += logit * logit;
    return margin / std::sqrt(square / n);
  }

  ThreadPool pool_;
  const ModelConfig config_;
  std::unique_ptr<attention::AttentionModel> model_;
  std::unique_ptr<router::Gate> gate_;
  const Routing* forced_ = nullptr;
  std::map<int32_t, std::vector<kernels::FfnWeights>> experts_;
  std::map<int32_t, std::vector<float>> gates_;
  kernels::FfnScratch scratch_;
};

}  // namespace minke::testing_support
