// The latents of whole pages in host memory, as they travel between nodes. Engine thread only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minke::attention {

class PageMemory {
 public:
  virtual ~PageMemory() = default;
  virtual int32_t page_layers() const = 0;
  // Of one page in one layer: [64, latent_dim] Act.
  virtual int64_t page_layer_bytes() const = 0;
  // Both return when the copy is done.
  virtual void ReadPage(int32_t layer, uint32_t page, std::byte* latents) = 0;
  virtual void WritePage(int32_t layer, uint32_t page, const std::byte* latents) = 0;
};

}  // namespace minke::attention
