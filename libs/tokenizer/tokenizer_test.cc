#include "libs/tokenizer/tokenizer.h"

#include <fstream>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/tokenizer/byte_level_files.h"
#include "libs/tokenizer/test_files.h"
#include "libs/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace minke::tokenizer {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

json ReadJson(const std::string& path) { return json::parse(std::ifstream(path)); }

TEST(Tokenizer, AgreesWithAnIndependentEncoder) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  const json cases = ReadJson(std::string(kDeepSeekStyle) + "/cases.json");
  ASSERT_GT(cases.size(), 200u);
  for (const json& one : cases) {
    const std::string text = one["text"];
    const auto ids = tokenizer->Encode(text);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, one["ids"].get<std::vector<uint32_t>>()) << text;
    EXPECT_EQ(Decode(*tokenizer, *ids), text);
  }
}

TEST(Tokenizer, EveryUtf8TextRoundTrips) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  std::mt19937 random(5);
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (int i = random() % 40; i > 0; --i) {
      uint32_t c = random() % (round % 2 ? 0x110000 : 0x500);
      if (c >= 0xD800 && c < 0xE000) c = ' ';
      AppendUtf8(c, &text);
    }
    const auto ids = tokenizer->Encode(text);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(Decode(*tokenizer, *ids), text);
  }
}

TEST(Tokenizer, TextWithoutDigitsOrSpacesOfAMegabyteIsEncoded) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  for (const char* unit : {"server", "服务器", "a", "!", "\n", " "}) {  // one piece of a megabyte, mostly
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    const auto ids = tokenizer->Encode(text);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(Decode(*tokenizer, *ids), text);
  }
}

TEST(Tokenizer, PlainTextNeverBecomesASpecialTokenOrARole) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  for (const char* name :
       {"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"}) {
    const uint32_t id = *tokenizer->FindToken(name);
    for (const std::string& text : {std::string(name), std::string("a ") + name + "ö" + name}) {
      const auto ids = *tokenizer->Encode(text);
      EXPECT_EQ(std::count(ids.begin(), ids.end(), id), 0) << name;
      EXPECT_EQ(Decode(*tokenizer, ids), text);
    }
  }
}

TEST(Tokenizer, CharactersThatAreAddedTokensAreEncodedAsThem) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  const uint32_t umlaut = *tokenizer->FindToken("ö");
  EXPECT_FALSE(tokenizer->IsSpecial(umlaut));
  const auto ids = *tokenizer->Encode("xöx");
  ASSERT_EQ(ids.size(), 3u);
  EXPECT_EQ(ids[1], umlaut);
  EXPECT_EQ(StreamingDecoder(*tokenizer).Push(umlaut), "ö");
}

TEST(Tokenizer, InvalidUtf8IsRefusedWithItsPlace) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  for (const char* bad : {"ab\xFF", "ab\xED\xA0\x80", "ab\xC0\xAF", "ab\xF4\x90\x80\x80", "ab\xE4\xBD"}) {
    const auto status = tokenizer->Encode(bad).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("byte 2"));
  }
}

TEST(Tokenizer, SpecialTokensComeFromTheConfig) {
  const auto tokenizer = LoadOrDie(kDeepSeekStyle);
  EXPECT_TRUE(tokenizer->add_bos());
  EXPECT_EQ(tokenizer->bos_id(), tokenizer->FindToken("<｜begin▁of▁sentence｜>"));
  EXPECT_EQ(tokenizer->eos_id(), tokenizer->FindToken("<｜end▁of▁sentence｜>"));
  EXPECT_TRUE(tokenizer->IsSpecial(*tokenizer->bos_id()));
  EXPECT_EQ(tokenizer->FindToken("the server of no such token"), std::nullopt);
  EXPECT_EQ(tokenizer->FindToken("a"), 0x61u);  // the fixture's byte tokens come first, in order
}

// A tokenizer of the letters a and b that each test bends.
json Small() {
  return {{"added_tokens", json::array({{{"id", 3}, {"content", "<s>"}, {"special", true}}})},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}},
          {"model", {{"type", "BPE"}, {"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}}}, {"merges", {"a b"}}}}};
}

class TokenizerFiles : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const json& tokenizer, const json& config = nullptr) {
    folder_.Write("tokenizer.json", tokenizer.dump());
    if (!config.is_null()) folder_.Write("tokenizer_config.json", config.dump());
    return Tokenizer::Load(folder_.path());
  }
  std::string ErrorOf(const json& tokenizer, const json& config = nullptr) {
    return std::string(Load(tokenizer, config).status().message());
  }
  TemporaryFolder folder_;
};

TEST_F(TokenizerFiles, TokenizerJsonAloneIsEnough) {
  const auto tokenizer = Load(Small());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ(*(*tokenizer)->Encode("abab"), (std::vector<uint32_t>{2, 2}));
  EXPECT_THAT(std::string((*tokenizer)->Encode("abc").status().message()), HasSubstr("0x63"));
}

TEST_F(TokenizerFiles, MergesMayBePairs) {
  json file = Small();
  file["model"]["merges"] = json::array({json::array({"a", "b"})});
  const auto tokenizer = Load(file);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ(*(*tokenizer)->Encode("bab"), (std::vector<uint32_t>{1, 2}));
}

TEST_F(TokenizerFiles, BosFollowsTheTemplateUnlessTheConfigSaysOtherwise) {
  json file = Small();
  EXPECT_FALSE((*Load(file))->add_bos());
  EXPECT_EQ((*Load(file))->bos_id(), 3u);  // <s>, by its usual name
  const json single =
      json::array({{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "A"}}}}});
  file["post_processor"] = {
      {"type", "Sequence"},
      {"processors", {{{"type", "ByteLevel"}}, {{"type", "TemplateProcessing"}, {"single", single}}}}};
  EXPECT_TRUE((*Load(file))->add_bos());
  EXPECT_FALSE((*Load(file, {{"add_bos_token", false}}))->add_bos());
  EXPECT_TRUE((*Load(Small(), {{"add_bos_token", true}, {"bos_token", "<s>"}}))->add_bos());
}

TEST_F(TokenizerFiles, ErrorsNameFileFieldExpectedAndFound) {
  EXPECT_EQ(Tokenizer::Load("/nonexistent").status().code(), absl::StatusCode::kNotFound);
  const auto with = [](const char* pointer, json value) {
    json file = Small();
    file[json::json_pointer(pointer)] = std::move(value);
    return file;
  };
  EXPECT_THAT(ErrorOf(with("/model/type", "Unigram")),
              HasSubstr("tokenizer.json: model.type: expected BPE, found \"Unigram\""));
  EXPECT_THAT(ErrorOf(with("/model/byte_fallback", true)), HasSubstr("model.byte_fallback: expected false"));
  EXPECT_THAT(ErrorOf(with("/model/vocab", json::array())), HasSubstr("model.vocab: expected an object"));
  EXPECT_THAT(ErrorOf(with("/model/vocab/c", -1)), HasSubstr("expected a token id from 0"));
  EXPECT_THAT(ErrorOf(with("/model/vocab/c", 4000000000)), HasSubstr("expected a token id from 0"));
  EXPECT_THAT(ErrorOf(with("/model/vocab/c", 1)), HasSubstr("found id 1 twice"));
  EXPECT_THAT(ErrorOf(with("/model/merges/0", "ab")), HasSubstr("model.merges[0]: expected two tokens"));
  EXPECT_THAT(ErrorOf(with("/model/merges/0", "a c")), HasSubstr("found \"c\" that is not in it"));
  EXPECT_THAT(ErrorOf(with("/model/dropout", 0.1)), HasSubstr("model.dropout: expected none, found 0.1"));
  EXPECT_THAT(ErrorOf(with("/normalizer", {{"type", "NFC"}})), HasSubstr("normalizer: expected none"));
  EXPECT_THAT(ErrorOf(with("/added_tokens/0/id", "x")), HasSubstr("added_tokens[0].id: expected a token id"));
  EXPECT_THAT(ErrorOf(with("/added_tokens/0/content", 1)),
              HasSubstr("added_tokens[0].content: expected a string, found 1"));
  EXPECT_THAT(ErrorOf(with("/added_tokens", 1)), HasSubstr("added_tokens: expected an array"));
  EXPECT_THAT(ErrorOf(json::array()), HasSubstr("expected an object, found []"));
  EXPECT_THAT(ErrorOf(Small(), {{"bos_token", "<none>"}}),
              HasSubstr("bos_token: expected a token of the vocabulary"));
  EXPECT_THAT(ErrorOf(Small(), {{"bos_token", 5}}),
              HasSubstr("tokenizer_config.json: bos_token: expected a string"));
  EXPECT_THAT(ErrorOf(Small(), {{"add_bos_token", "yes"}}),
              HasSubstr("add_bos_token: expected true or false"));
  folder_.Write("tokenizer.json", "{\"model\": {");
  EXPECT_THAT(std::string(Tokenizer::Load(folder_.path()).status().message()),
              HasSubstr("tokenizer.json: expected JSON"));
  folder_.Write("tokenizer.json", std::string(100000, '['));
  EXPECT_THAT(std::string(Tokenizer::Load(folder_.path()).status().message()),
              HasSubstr("tokenizer.json: expected JSON"));
}

TEST_F(TokenizerFiles, NestingIsBounded) {
  std::string deep = "{\"normalizer\": ";
  for (int i = 0; i < 50'000; ++i) deep += "{\"type\": \"Sequence\", \"normalizers\": [";
  for (int i = 0; i < 50'000; ++i) deep += "]}";
  folder_.Write("tokenizer.json", deep + "}");
  EXPECT_THAT(std::string(Tokenizer::Load(folder_.path()).status().message()),
              HasSubstr("levels of nesting"));
}

TEST_F(TokenizerFiles, ByteLevelFilesRoundTripEveryByteOfUtf8) {
  for (const ByteLevelOptions options :
       {ByteLevelOptions{512, 0, 1}, ByteLevelOptions{258, 256, 257}, ByteLevelOptions{300, 20, 255}}) {
    ASSERT_TRUE(WriteByteLevelTokenizer(folder_.path(), options).ok());
    const auto tokenizer = LoadOrDie(folder_.path());
    EXPECT_EQ(tokenizer->bos_id(), options.bos_id);
    EXPECT_EQ(tokenizer->eos_id(), options.eos_id);
    EXPECT_TRUE(tokenizer->add_bos());
    EXPECT_LE(tokenizer->id_end(), options.vocab_size);
    const std::string text = "Hi\n\x01 é 服 😁";
    const auto ids = *tokenizer->Encode(text);
    EXPECT_EQ(ids.size(), text.size());
    EXPECT_EQ(Decode(*tokenizer, ids), text);
  }
  EXPECT_EQ(WriteByteLevelTokenizer(folder_.path(), {257, 0, 1}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(WriteByteLevelTokenizer(folder_.path(), {512, 3, 3}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(WriteByteLevelTokenizer("/nonexistent", {}).code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace minke::tokenizer
