#include "libs/tokenizer/bpe.h"

#include <random>

#include "gtest/gtest.h"

namespace minke::tokenizer {
namespace {

// 256 bytes, then `merges` random pairs of tokens that exist by then.
Bpe::Options RandomOptions(std::mt19937& random, int merges) {
  Bpe::Options options;
  for (uint32_t byte = 0; byte < 256; ++byte)
    options.vocab.emplace_back(std::string(1, static_cast<char>(byte)), byte);
  const auto pick = [&]() -> uint32_t {
    const uint32_t size = static_cast<uint32_t>(options.vocab.size());
    if (size > 256 && random() % 2) return 256 + random() % (size - 256);
    return 'a' + random() % 3;
  };
  for (int i = 0; i < merges; ++i) {
    const uint32_t left = pick(), right = pick();
    const std::string bytes = options.vocab[left].first + options.vocab[right].first;
    bool known = bytes.size() > 40;
    for (const auto& [other, id] : options.vocab) known = known || other == bytes;
    if (known) continue;
    const uint32_t id = static_cast<uint32_t>(options.vocab.size());
    options.vocab.emplace_back(bytes, id);
    options.merges.push_back({left, right, id});
  }
  return options;
}

// The definition: while any pair has a rank, merge the leftmost pair of the lowest rank.
std::vector<uint32_t> Reference(const Bpe::Options& options, const std::string& piece) {
  std::vector<uint32_t> ids;
  for (const char c : piece) ids.push_back(static_cast<uint8_t>(c));
  for (;;) {
    size_t best_rank = options.merges.size(), best_at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (options.merges[rank].left == ids[i] && options.merges[rank].right == ids[i + 1]) {
          best_rank = rank;
          best_at = i;
        }
      }
    }
    if (best_rank == options.merges.size()) return ids;
    ids[best_at] = options.merges[best_rank].result;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
  }
}

TEST(Bpe, AgreesWithTheDefinitionOnRandomMergesAndLengths) {
  std::mt19937 random(1);
  for (int round = 0; round < 30; ++round) {
    const Bpe::Options options = RandomOptions(random, 60);
    const auto bpe = Bpe::Create(options);
    ASSERT_TRUE(bpe.ok());
    for (const size_t length : {1, 2, 3, 7, 31, 32, 33, 64, 200}) {  // both sides of the heap's threshold
      std::string piece;
      while (piece.size() < length) piece.push_back(static_cast<char>('a' + random() % 4));
      std::vector<uint32_t> ids;
      ASSERT_TRUE(bpe->Encode(piece, &ids).ok());
      EXPECT_EQ(ids, Reference(options, piece)) << piece;
    }
  }
}

TEST(Bpe, TokenThatNoMergeLeadsToIsOnlyUsedWhenMergesAreIgnored) {
  Bpe::Options options;
  options.vocab = {{"a", 0}, {"b", 1}, {"ab", 2}};
  std::vector<uint32_t> ids;
  ASSERT_TRUE(Bpe::Create(options)->Encode("ab", &ids).ok());
  EXPECT_EQ(ids, (std::vector<uint32_t>{0, 1}));
  options.ignore_merges = true;
  ids.clear();
  ASSERT_TRUE(Bpe::Create(options)->Encode("ab", &ids).ok());
  EXPECT_EQ(ids, (std::vector<uint32_t>{2}));
}

TEST(Bpe, ByteWithoutATokenIsAnErrorUnlessThereIsAnUnknownToken) {
  Bpe::Options options;
  options.vocab = {{"a", 0}};
  std::vector<uint32_t> ids;
  const absl::Status status = Bpe::Create(options)->Encode("az", &ids);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("0x7a"), std::string_view::npos) << status;
  options.unknown_id = 9;
  ids.clear();
  ASSERT_TRUE(Bpe::Create(options)->Encode("az", &ids).ok());
  EXPECT_EQ(ids, (std::vector<uint32_t>{0, 9}));
}

}  // namespace
}  // namespace minke::tokenizer
