#include "libs/tokenizer/bpe.h"

#include <limits>
#include <queue>

#include "absl/strings/str_format.h"
#include "libs/base/status.h"

namespace minke::tokenizer {
namespace {

// Below this the quadratic scan touches less memory than a heap and a linked list; words are rarely longer.
constexpr size_t kShortPiece = 32;

}  // namespace

absl::StatusOr<Bpe> Bpe::Create(Options options) {
  Bpe bpe;
  bpe.byte_id_.fill(-1);
  bpe.unknown_id_ = options.unknown_id;
  for (const auto& [bytes, id] : options.vocab) {
    if (bytes.size() == 1) bpe.byte_id_[static_cast<uint8_t>(bytes[0])] = id;
  }
  bpe.merges_.reserve(options.merges.size());
  for (uint32_t rank = 0; rank < options.merges.size(); ++rank) {
    const Merge& merge = options.merges[rank];
    bpe.merges_.try_emplace(static_cast<uint64_t>(merge.left) << 32 | merge.right,
                            Ranked{rank, merge.result});
  }
  // Most pieces are tokens. Knowing which of them the merges really lead to answers those with one look-up.
  StringMap<uint32_t> whole;
  std::vector<uint32_t> ids;
  for (const auto& [bytes, id] : options.vocab) {
    if (bytes.empty()) continue;
    ids.clear();
    if (options.ignore_merges || (bpe.Encode(bytes, &ids).ok() && ids.size() == 1 && ids[0] == id)) {
      whole.try_emplace(bytes, id);
    }
  }
  bpe.whole_ = std::move(whole);
  return bpe;
}

absl::Status Bpe::Encode(std::string_view piece, std::vector<uint32_t>* ids) const {
  if (piece.empty()) return absl::OkStatus();
  if (const auto found = whole_.find(piece); found != whole_.end()) {
    ids->push_back(found->second);
    return absl::OkStatus();
  }
  std::vector<uint32_t> symbols;
  symbols.reserve(piece.size());
  for (const char c : piece) {
    const int64_t id = byte_id_[static_cast<uint8_t>(c)];
    if (id < 0 && unknown_id_ < 0) {
      return absl::InvalidArgumentError(
          absl::StrFormat("the tokenizer has no token for the byte 0x%02x", static_cast<uint8_t>(c)));
    }
    symbols.push_back(static_cast<uint32_t>(id < 0 ? unknown_id_ : id));
  }
  if (symbols.size() <= kShortPiece) {
    MergeShort(&symbols);
  } else {
    MergeLong(&symbols);
  }
  ids->insert(ids->end(), symbols.begin(), symbols.end());
  return absl::OkStatus();
}

void Bpe::MergeShort(std::vector<uint32_t>* symbols) const {
  std::vector<uint32_t>& s = *symbols;
  while (s.size() > 1) {
    const Ranked* best = nullptr;
    size_t best_at = 0;
    for (size_t i = 0; i + 1 < s.size(); ++i) {
      const Ranked* found = Find(s[i], s[i + 1]);
      if (found != nullptr && (best == nullptr || found->rank < best->rank)) best = found, best_at = i;
    }
    if (best == nullptr) return;
    s[best_at] = best->result;
    s.erase(s.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
  }
}

void Bpe::MergeLong(std::vector<uint32_t>* symbols) const {
  constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
  struct Node {
    uint32_t id, previous, next;
    bool alive;
  };
  struct Candidate {
    uint32_t rank, at, left, right, result;
    // A heap of the lowest rank, leftmost first.
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  const uint32_t count = static_cast<uint32_t>(symbols->size());
  std::vector<Node> nodes(count);
  for (uint32_t i = 0; i < count; ++i) {
    nodes[i] = {(*symbols)[i], i == 0 ? kNone : i - 1, i + 1 == count ? kNone : i + 1, true};
  }
  std::priority_queue<Candidate> heap;
  const auto consider = [&](uint32_t at) {
    if (at == kNone || nodes[at].next == kNone) return;
    const uint32_t left = nodes[at].id;
    const uint32_t right = nodes[nodes[at].next].id;
    if (const Ranked* found = Find(left, right)) heap.push({found->rank, at, left, right, found->result});
  };
  for (uint32_t i = 0; i + 1 < count; ++i) consider(i);
  while (!heap.empty()) {
    const Candidate top = heap.top();
    heap.pop();
    Node& left = nodes[top.at];
    // Either half may have been merged into something else since this was pushed.
    if (!left.alive || left.id != top.left || left.next == kNone || nodes[left.next].id != top.right)
      continue;
    Node& right = nodes[left.next];
    left.id = top.result;
    left.next = right.next;
    right.alive = false;
    if (left.next != kNone) nodes[left.next].previous = top.at;
    consider(left.previous);
    consider(top.at);
  }
  symbols->clear();
  for (uint32_t at = 0; at != kNone; at = nodes[at].next) symbols->push_back(nodes[at].id);
}

}  // namespace minke::tokenizer
