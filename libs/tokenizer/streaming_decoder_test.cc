#include <random>

#include "gtest/gtest.h"
#include "libs/tokenizer/byte_level_files.h"
#include "libs/tokenizer/test_files.h"
#include "libs/tokenizer/tokenizer.h"
#include "libs/tokenizer/utf8.h"

namespace minke::tokenizer {
namespace {

class StreamingDecoderTest : public ::testing::Test {
 protected:
  StreamingDecoderTest() {
    EXPECT_TRUE(WriteByteLevelTokenizer(folder_.path(), {.vocab_size = 300, .bos_id = 0, .eos_id = 1}).ok());
    tokenizer_ = LoadOrDie(folder_.path());
  }
  std::vector<uint32_t> Ids(std::string_view bytes) const {
    std::vector<uint32_t> ids;
    for (const char c : bytes) ids.push_back(*tokenizer_->FindToken(std::string_view(&c, 1)));
    return ids;
  }
  // The pieces joined; each of them has to be whole characters.
  std::string Stream(std::string_view bytes) const {
    StreamingDecoder decoder(*tokenizer_);
    std::string text;
    for (const uint32_t id : Ids(bytes)) {
      const std::string piece = decoder.Push(id);
      EXPECT_EQ(ValidUtf8Prefix(piece), piece.size());
      text += piece;
    }
    return text + decoder.Finish();
  }

  TemporaryFolder folder_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(StreamingDecoderTest, CharacterComesOutWithItsLastByte) {
  StreamingDecoder decoder(*tokenizer_);
  const auto ids = Ids("😁x");
  EXPECT_EQ(decoder.Push(ids[0]), "");
  EXPECT_EQ(decoder.Push(ids[1]), "");
  EXPECT_EQ(decoder.Push(ids[2]), "");
  EXPECT_EQ(decoder.Push(ids[3]), "😁");
  EXPECT_EQ(decoder.Push(ids[4]), "x");
  EXPECT_EQ(decoder.Finish(), "");
}

TEST_F(StreamingDecoderTest, OneReplacementPerMaximalInvalidSubpart) {
  // The sequences of Unicode 15, section 3.9, tables 3-8 to 3-11.
  EXPECT_EQ(Stream("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82"
                   "A"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(Stream("\xED\xA0\x80\xED\xBF\xBF\xED\xAF"
                   "A"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(Stream("\xF4\x91\x92\x93\xFF"
                   "A\x80\xBF"
                   "B"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA\uFFFD\uFFFDB");
  EXPECT_EQ(Stream("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF"
                   "A"),
            "\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(Stream("\xF0\x9F\x98"), "\uFFFD");  // incomplete at the end: one
}

TEST_F(StreamingDecoderTest, SpecialTokensHaveNoTextAndDoNotBreakCharacters) {
  StreamingDecoder decoder(*tokenizer_);
  const auto ids = Ids("é");
  EXPECT_EQ(decoder.Push(*tokenizer_->bos_id()), "");
  EXPECT_EQ(decoder.Push(ids[0]), "");
  EXPECT_EQ(decoder.Push(*tokenizer_->eos_id()), "");
  EXPECT_EQ(decoder.Push(ids[1]), "é");
  StreamingDecoder verbatim(*tokenizer_, /*skip_special=*/false);
  EXPECT_EQ(verbatim.Push(*tokenizer_->eos_id()), "<｜end▁of▁sentence｜>");
}

TEST_F(StreamingDecoderTest, IdsWithoutATokenHaveNoText) {
  StreamingDecoder decoder(*tokenizer_);
  EXPECT_EQ(decoder.Push(299), "");
  EXPECT_EQ(decoder.Push(4'000'000'000u), "");
  EXPECT_FALSE(tokenizer_->HasToken(299));
}

TEST_F(StreamingDecoderTest, RandomBytesStreamToTheTextOfTheWhole) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (int i = random() % 24; i > 0; --i) {
      bytes.push_back(static_cast<char>(random() % 3 ? 0x80 + random() % 0x80 : random() % 0x80));
    }
    std::string whole;
    for (std::string_view rest = bytes; !rest.empty();) {
      const Utf8Step step = NextUtf8(rest);
      whole += step.kind == Utf8Kind::kCharacter ? rest.substr(0, step.length) : kReplacementCharacter;
      rest.remove_prefix(step.length);
    }
    EXPECT_EQ(Stream(bytes), whole);
  }
}

}  // namespace
}  // namespace minke::tokenizer
