#include "services/attention/latent_cache/page_pool.h"

#include "libs/base/status.h"

namespace minke::attention {

PagePool::PagePool(int64_t pages) : taken_(pages, false) {
  for (int64_t page = pages; page > 0; --page) free_.push_back(static_cast<uint32_t>(page - 1));
}

std::optional<uint32_t> PagePool::Take() {
  if (free_.empty()) return std::nullopt;
  const uint32_t page = free_.back();
  free_.pop_back();
  taken_[page] = true;
  return page;
}

void PagePool::Release(uint32_t page) {
  MK_CHECK(page < taken_.size() && taken_[page]);
  taken_[page] = false;
  free_.push_back(page);
}

}  // namespace minke::attention
