#include "services/attention/latent_cache/page_pool.h"

#include <algorithm>
#include <utility>

#include "libs/base/status.h"

namespace minke::attention {

PagePool::PagePool(int64_t pages) : pages_(pages) {
  free_.reserve(pages);
  for (int64_t page = pages; page > 0; --page) free_.push_back(static_cast<uint32_t>(page - 1));
}

std::optional<uint32_t> PagePool::Take() {
  if (free_.empty()) {
    if (oldest_ < 0) return std::nullopt;
    const uint32_t page = static_cast<uint32_t>(oldest_);
    Unlink(page);
    Withdraw(page);
    free_.push_back(page);
  }
  const uint32_t page = free_.back();
  free_.pop_back();
  pages_[page].references = 1;
  return page;
}

void PagePool::Release(uint32_t page) {
  MK_CHECK(page < pages_.size() && pages_[page].references > 0);
  if (--pages_[page].references > 0) return;
  if (pages_[page].prefix.publication != 0) {
    Append(page);
  } else {
    free_.push_back(page);
  }
}

const PagePool::Page* PagePool::Find(uint64_t hash, uint64_t parent, std::span<const uint32_t> tokens) const {
  const auto found = by_hash_.find(hash);
  if (found == by_hash_.end()) return nullptr;
  const Page& page = pages_[found->second];
  return page.parent == parent && std::equal(tokens.begin(), tokens.end(), page.tokens.begin()) ? &page
                                                                                                : nullptr;
}

std::vector<uint32_t> PagePool::Match(std::span<const uint32_t> tokens, Prefix& prefix) {
  std::vector<uint32_t> matched;
  prefix = {};
  for (size_t end = kernels::kPageTokens; end <= tokens.size(); end += kernels::kPageTokens) {
    const auto page_tokens = tokens.subspan(end - kernels::kPageTokens, kernels::kPageTokens);
    const Page* found =
        Find(cluster::ExtendPrefix(prefix.hash, page_tokens), prefix.publication, page_tokens);
    if (found == nullptr) break;
    prefix = found->prefix;
    const uint32_t page = static_cast<uint32_t>(found - pages_.data());
    if (pages_[page].references++ == 0) Unlink(page);
    matched.push_back(page);
  }
  return matched;
}

Prefix PagePool::Publish(uint32_t page, Prefix before, std::span<const uint32_t> tokens) {
  MK_CHECK(page < pages_.size() && pages_[page].references > 0 && pages_[page].prefix.publication == 0);
  const uint64_t hash = cluster::ExtendPrefix(before.hash, tokens);
  if (const Page* known = Find(hash, before.publication, tokens)) return known->prefix;
  // Another publication under this hash can only be a leftover whose own parent is gone, or a collision:
  // nothing finds it through its chain better than through ours.
  if (const auto other = by_hash_.find(hash); other != by_hash_.end()) {
    const uint32_t replaced = other->second;
    Withdraw(replaced);
    if (pages_[replaced].references == 0) {
      Unlink(replaced);
      free_.push_back(replaced);
    }
  }
  Page& published = pages_[page];
  published.prefix = {hash, ++publications_};
  published.parent = before.publication;
  published.tokens.assign(tokens.begin(), tokens.end());
  by_hash_[hash] = page;
  changes_.push_back({hash, true});
  return published.prefix;
}

// Not to be found any more.
void PagePool::Withdraw(uint32_t page) {
  Page& withdrawn = pages_[page];
  by_hash_.erase(withdrawn.prefix.hash);
  changes_.push_back({withdrawn.prefix.hash, false});
  withdrawn.prefix = {};
}

void PagePool::Unlink(uint32_t page) {
  Page& p = pages_[page];
  (p.older < 0 ? oldest_ : pages_[p.older].newer) = p.newer;
  (p.newer < 0 ? newest_ : pages_[p.newer].older) = p.older;
  p.older = p.newer = -1;
  --unused_;
}

void PagePool::Append(uint32_t page) {
  Page& p = pages_[page];
  p.older = newest_;
  p.newer = -1;
  (newest_ < 0 ? oldest_ : pages_[newest_].newer) = static_cast<int32_t>(page);
  newest_ = static_cast<int32_t>(page);
  ++unused_;
}

}  // namespace minke::attention
