// Pages of the latent cache: 64 tokens each, through all layers. Hands out page numbers; the memory behind
// them is LatentCache. Thread-compatible.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "libs/base/dtype.h"
#include "libs/kernels/cpu/mla.h"
#include "libs/kernels/cpu/packed_matrix.h"
#include "libs/model/config.h"

namespace minke::attention {

class PagePool {
 public:
  explicit PagePool(int64_t pages);
  // The page released last comes first: memory that was never needed is never touched.
  std::optional<uint32_t> Take();
  // REQUIRES: `page` is taken.
  void Release(uint32_t page);
  int64_t total() const { return static_cast<int64_t>(taken_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  int64_t used() const { return total() - free(); }

 private:
  std::vector<uint32_t> free_;
  std::vector<bool> taken_;
};

inline int64_t PagesFor(int64_t tokens) { return (tokens + kernels::kPageTokens - 1) / kernels::kPageTokens; }

// [layers, pages, 64, latent_dim] Act; zero until written, so unwritten memory costs nothing.
class LatentCache {
 public:
  LatentCache(const ModelConfig& config, Precision precision, int64_t pages)
      : layer_bytes_(pages * kernels::kPageTokens * config.latent_dim() * ActivationBytes(precision)),
        storage_(layer_bytes_ * config.num_hidden_layers) {}
  std::byte* layer(int32_t layer) const { return storage_.data() + layer * layer_bytes_; }
  int64_t bytes() const { return storage_.bytes(); }

 private:
  int64_t layer_bytes_;
  kernels::HugeBuffer storage_;
};

}  // namespace minke::attention
