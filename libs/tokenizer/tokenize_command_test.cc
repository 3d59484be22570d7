#include "libs/tokenizer/tokenize_command.h"

#include <random>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/tokenizer/test_files.h"
#include "libs/tokenizer/utf8.h"

namespace minke::tokenizer {
namespace {

using ::testing::HasSubstr;

struct Result {
  int code;
  std::string out, err;
};

Result Tokenize(TokenizeOptions options, const std::string& input) {
  if (options.directory.empty()) options.directory = kDeepSeekStyle;
  std::istringstream in(input);
  std::ostringstream out, err;
  const int code = RunTokenizeCommand(options, in, out, err);
  return {code, out.str(), err.str()};
}

TEST(TokenizeCommand, IdsAreSeparatedBySpaces) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  const uint32_t z = *tokenizer->FindToken("Z");
  EXPECT_EQ(Tokenize({}, "Z\nZ").out, std::to_string(z) + " 10 " + std::to_string(z) + "\n");
  EXPECT_EQ(Tokenize({.bos = true}, "Z").out,
            std::to_string(*tokenizer->bos_id()) + " " + std::to_string(z) + "\n");
  EXPECT_EQ(Tokenize({.lines = true, .bos = true}, "Z\nZ\n").out,
            std::to_string(*tokenizer->bos_id()) + " " + std::to_string(z) + "\n" +
                std::to_string(*tokenizer->bos_id()) + " " + std::to_string(z) + "\n");
  EXPECT_EQ(Tokenize({}, "").out, "\n");
  EXPECT_EQ(Tokenize({.lines = true}, "").out, "");
}

TEST(TokenizeCommand, DecodeIsTheInverseByteForByte) {
  std::mt19937 random(11);
  std::vector<std::string> texts = {
      "", "\n", "a", "a\n", "a\n\nb", "a\r\nb\r\n", " \n \n", "😁\n😁", std::string("\0z", 2)};
  for (int i = 0; i < 100; ++i) {
    std::string text;
    for (int n = random() % 30; n > 0; --n) {
      const uint32_t c = random() % 3 ? random() % 0x80 : random() % 0x3000;
      AppendUtf8(random() % 8 ? c : '\n', &text);
    }
    texts.push_back(text);
  }
  for (const std::string& text : texts) {
    for (const bool lines : {false, true}) {
      for (const bool bos : {false, true}) {
        const Result ids = Tokenize({.lines = lines, .bos = bos}, text);
        ASSERT_EQ(ids.code, 0) << ids.err;
        const Result back = Tokenize({.lines = lines, .decode = true}, ids.out);
        ASSERT_EQ(back.code, 0) << back.err;
        EXPECT_EQ(back.out, text) << "lines=" << lines << " bos=" << bos;
      }
    }
  }
}

TEST(TokenizeCommand, DecodeGivesBytesNotCharacters) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  EXPECT_EQ(Tokenize({.decode = true}, std::to_string(*tokenizer->FindToken("\xF0")) + "\n").out, "\xF0");
}

TEST(TokenizeCommand, BadInputIsOneLineOnStderr) {
  Result result = Tokenize({.decode = true}, "1 x");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("found \"x\""));
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1);
  EXPECT_THAT(Tokenize({.decode = true}, "99999999").err, HasSubstr("found \"99999999\""));
  EXPECT_THAT(Tokenize({.decode = true}, "-1").err, HasSubstr("found \"-1\""));
  result = Tokenize({.lines = true}, "ok\n\xFF\n");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("line 2: text is not UTF-8"));
  EXPECT_THAT(Tokenize({.directory = "/nonexistent"}, "").err,
              HasSubstr("/nonexistent/tokenizer.json: no such file"));
}

}  // namespace
}  // namespace minke::tokenizer
