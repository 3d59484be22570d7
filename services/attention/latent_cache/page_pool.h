// Pages of the latent cache: 64 tokens each, through all layers. Hands out page numbers; the memory behind
// them is LatentCache. Thread-compatible.
//
// Reuse: a full page can be published under the tokens it and all pages before it hold. Later sequences that
// begin with the same tokens share it, read-only, by reference count. A published page that nobody refers to
// any more stays until its memory is needed; the one unused for longest goes first.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "libs/base/dtype.h"
#include "libs/cluster/prefix_hash.h"
#include "libs/kernels/cpu/mla.h"
#include "libs/kernels/cpu/packed_matrix.h"
#include "libs/model/config.h"

namespace minke::attention {

static_assert(cluster::kPrefixPageTokens == kernels::kPageTokens);

// A published prefix: what its last page is found by, and the number of that publication. Numbers are never
// reused, so a chain of (parent, tokens) names exactly one sequence of tokens, whatever its hashes are.
struct Prefix {
  uint64_t hash = cluster::kEmptyPrefix;
  uint64_t publication = 0;
};

// A prefix, by name, that became findable (gained) or no longer is.
struct PrefixChange {
  uint64_t name = 0;
  bool gained = false;
};

class PagePool {
 public:
  explicit PagePool(int64_t pages);
  // A page of one's own. Unpublished pages come first, those released last before others: memory that was
  // never needed is never touched. Then the published page that was unused for longest.
  std::optional<uint32_t> Take();
  // Gives one reference back. REQUIRES: the caller has one.
  void Release(uint32_t page);

  // The longest published prefix of `tokens`, whole pages; one reference to each goes to the caller. `prefix`
  // becomes that prefix.
  std::vector<uint32_t> Match(std::span<const uint32_t> tokens, Prefix& prefix);
  // Makes a full page findable: it holds `tokens` (64) after `before`. If another page holds the same
  // already, that one stays. Returns the extended prefix. REQUIRES: the caller has a reference and will not
  // write to the page again.
  Prefix Publish(uint32_t page, Prefix before, std::span<const uint32_t> tokens);
  // Since the last call, in order.
  std::vector<PrefixChange> TakeChanges() { return std::exchange(changes_, {}); }

  int64_t total() const { return std::ssize(pages_); }
  int64_t available() const { return std::ssize(free_) + unused_; }  // what Take can hand out
  int64_t used() const { return total() - available(); }             // someone refers to them
  int64_t cached() const { return unused_; }                         // kept for reuse only

 private:
  struct Page {
    int32_t references = 0;
    Prefix prefix;        // publication 0: not published
    uint64_t parent = 0;  // publication of the prefix before
    std::vector<uint32_t> tokens;
    int32_t older = -1, newer = -1;  // neighbours among the unused published pages
  };
  const Page* Find(uint64_t hash, uint64_t parent, std::span<const uint32_t> tokens) const;
  void Unlink(uint32_t page);
  void Append(uint32_t page);
  void Withdraw(uint32_t page);

  std::vector<Page> pages_;
  std::vector<uint32_t> free_;         // unpublished
  int32_t oldest_ = -1, newest_ = -1;  // unused published pages
  int64_t unused_ = 0;
  absl::flat_hash_map<uint64_t, uint32_t> by_hash_;  // published pages
  uint64_t publications_ = 0;
  std::vector<PrefixChange> changes_;
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
