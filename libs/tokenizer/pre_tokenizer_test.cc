#include "libs/tokenizer/pre_tokenizer.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/tokenizer/pattern.h"
#include "libs/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace minke::tokenizer {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const json kByteLevel = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};

std::vector<std::string> Split(const json& step, std::string_view text) {
  const auto pre = PreTokenizer::Parse({{"type", "Sequence"}, {"pretokenizers", {step, kByteLevel}}});
  if (!pre.ok()) return {std::string(pre.status().message())};
  PreTokenizer::Pieces pieces;
  EXPECT_TRUE((*pre)->Split(text, &pieces).ok());
  return {pieces.views.begin(), pieces.views.end()};
}

json SplitStep(const char* behavior, bool invert = false) {
  return {{"type", "Split"}, {"pattern", {{"String", "-"}}}, {"behavior", behavior}, {"invert", invert}};
}

TEST(PreTokenizer, SplitBehaviours) {
  // The examples of the tokenizers library's documentation of SplitDelimiterBehavior.
  const char* text = "the-final--countdown";
  EXPECT_THAT(Split(SplitStep("Removed"), text), ElementsAre("the", "final", "countdown"));
  EXPECT_THAT(Split(SplitStep("Isolated"), text), ElementsAre("the", "-", "final", "-", "-", "countdown"));
  EXPECT_THAT(Split(SplitStep("MergedWithPrevious"), text), ElementsAre("the-", "final-", "-", "countdown"));
  EXPECT_THAT(Split(SplitStep("MergedWithNext"), text), ElementsAre("the", "-final", "-", "-countdown"));
  EXPECT_THAT(Split(SplitStep("Contiguous"), text), ElementsAre("the", "-", "final", "--", "countdown"));
  EXPECT_THAT(Split(SplitStep("Removed", true), text), ElementsAre("-", "-", "-"));
  EXPECT_THAT(Split(SplitStep("Isolated", true), text),
              ElementsAre("the", "-", "final", "-", "-", "countdown"));
}

TEST(PreTokenizer, DigitsFollowUnicode) {
  const json individual = {{"type", "Digits"}, {"individual_digits", true}};
  EXPECT_THAT(Split(individual, "a12٣b½"), ElementsAre("a", "1", "2", "٣", "b", "½"));
  const json runs = {{"type", "Digits"}, {"individual_digits", false}};
  EXPECT_THAT(Split(runs, "a12٣b"), ElementsAre("a", "12٣", "b"));
}

TEST(PreTokenizer, ByteLevelCutsAsGpt2Does) {
  const auto pre =
      PreTokenizer::Parse({{"type", "ByteLevel"}, {"add_prefix_space", true}, {"use_regex", true}});
  ASSERT_TRUE(pre.ok()) << pre.status();
  PreTokenizer::Pieces pieces;
  ASSERT_TRUE((*pre)->Split("it's  é12 !?\n", &pieces).ok());
  EXPECT_THAT(pieces.views, ElementsAre(" it", "'s", " ", " é", "12", " !?", "\n"));
}

TEST(PreTokenizer, DollarMatchesBeforeANewline) {
  const json step = {
      {"type", "Split"}, {"pattern", {{"Regex", "\\s+$"}}}, {"behavior", "Isolated"}, {"invert", false}};
  EXPECT_THAT(Split(step, "a  \nb \u00a0\u3000"), ElementsAre("a", "  ", "\nb", " \u00a0\u3000"));
  EXPECT_THAT(Split(step, "a \t"), ElementsAre("a", " \t"));
  EXPECT_THAT(Split(step, " a"), ElementsAre(" a"));
}

TEST(PreTokenizer, TrailingSpaceIsTheSameSetAsTheRegularExpression) {
  const auto fast = Pattern::Regex("\\s+$");
  const auto slow = Pattern::Regex("\\s+$(?:)");  // the same language, not recognised as \s+$
  ASSERT_TRUE(fast.ok() && slow.ok());
  for (uint32_t c = 1; c < 0x110000; c = c == 0xD7FF ? 0xE000 : c + 1) {
    // U+180E is white space to PCRE2, but has not been to Unicode (and Oniguruma) since version 6.3.
    if (c == '\n' || c == 0x180E) continue;
    std::string text = "x";
    AppendUtf8(c, &text);
    std::vector<Match> a, b;
    ASSERT_TRUE(fast->FindAll(text, &a).ok() && slow->FindAll(text, &b).ok());
    ASSERT_EQ(a.size(), b.size()) << std::hex << c;
  }
}

TEST(PreTokenizer, LongRunOfSpacesIsNotQuadratic) {
  const json step = {
      {"type", "Split"}, {"pattern", {{"Regex", "\\s+$"}}}, {"behavior", "Isolated"}, {"invert", false}};
  // 2^22 positions tried one by one would be 10^13 steps: this test would not end.
  EXPECT_EQ(Split(step, std::string(1 << 22, ' ') + "5").size(), 1u);
}

TEST(PreTokenizer, UnknownTypesAreRefusedByName) {
  const auto message = [](const json& value) {
    return std::string(PreTokenizer::Parse(value).status().message());
  };
  EXPECT_THAT(message({{"type", "Metaspace"}}), HasSubstr("found \"Metaspace\""));
  EXPECT_THAT(message(nullptr), HasSubstr("pre_tokenizer: expected an object, found null"));
  EXPECT_THAT(message({{"type", "Digits"}}), HasSubstr("expected ByteLevel as the last step"));
  EXPECT_THAT(message({{"type", "Sequence"}, {"pretokenizers", {kByteLevel, {{"type", "Digits"}}}}}),
              HasSubstr("pre_tokenizer.pretokenizers[0]: expected ByteLevel to be the last"));
  EXPECT_THAT(message({{"type", "Sequence"}}), HasSubstr("pretokenizers: expected an array, found nothing"));
  EXPECT_THAT(Split({{"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}}, "x")[0],
              HasSubstr("\"(\" is not a pattern: missing closing parenthesis"));
  EXPECT_THAT(Split({{"type", "Split"}, {"pattern", "x"}, {"behavior", "Isolated"}}, "x")[0],
              HasSubstr("pretokenizers[0].pattern: expected"));
  EXPECT_THAT(Split(SplitStep("Sideways"), "x")[0], HasSubstr("found \"Sideways\""));
}

}  // namespace
}  // namespace minke::tokenizer
