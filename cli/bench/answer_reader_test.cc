#include "cli/bench/answer_reader.h"

#include <gtest/gtest.h>

namespace minke::cli::bench {
namespace {

using std::chrono::milliseconds;

const Clock::time_point kBegin{};

std::string Event(const std::string& json) { return "data: " + json + "\n\n"; }

AnswerReader Read(const std::vector<std::string>& pieces, bool finish = true) {
  AnswerReader reader;
  int at_ms = 0;
  for (const std::string& piece : pieces) reader.Feed(piece, kBegin + milliseconds(at_ms += 10));
  if (finish) reader.Finish(kBegin + milliseconds(at_ms + 10));
  return reader;
}

const std::string kUsage =
    R"({"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}})";

TEST(AnswerReader, AnEndInTheMiddleIsAFailure) {
  for (const std::vector<std::string>& pieces :
       {std::vector<std::string>{},
        {Event(R"({"choices":[{"text":"a","finish_reason":null}]})")},
        {"<html>"}}) {
    const AnswerReader reader = Read(pieces);
    EXPECT_FALSE(reader.whole());
    EXPECT_FALSE(reader.failure().empty());
    EXPECT_FALSE(reader.failure_is_error_event());
  }
}

TEST(AnswerReader, ErrorsInTheStream) {
  for (const std::string& text :
       {Event(R"({"error":{"message":"out of pages","code":500}})"), Event(R"({"error":"out of pages"})"),
        Event(R"({"error":{"detail":"out of pages"}})"),
        std::string("error: {\"message\":\"out of pages\"}\n\n"),
        std::string("event: error\ndata: out of pages\n\n")}) {
    const AnswerReader reader = Read({Event(R"({"choices":[{"text":"a"}]})"), text, Event("[DONE]")});
    EXPECT_TRUE(reader.failure_is_error_event()) << text;
    EXPECT_EQ(reader.failure(), "out of pages") << text;
    EXPECT_FALSE(reader.whole());
    EXPECT_TRUE(reader.ended());
  }
  EXPECT_TRUE(Read({Event(R"({"error":null,"choices":[{"text":"a","finish_reason":"stop"}]})")}).whole());
}

TEST(AnswerReader, WhatIsNoJsonIsAFailure) {
  for (const char* data : {"{", "3", "[1]", "\xff\xfe"}) {
    const AnswerReader reader = Read({Event(data)}, /*finish=*/false);
    EXPECT_FALSE(reader.failure().empty()) << data;
    EXPECT_FALSE(reader.failure_is_error_event());
  }
}

TEST(AnswerReader, WrongTypesAreNotTrusted) {
  const AnswerReader reader =
      Read({Event(R"({"choices":{"text":"a"},"usage":[1]})"),
            Event(R"({"choices":[1,null,{"text":5,"delta":"x"}]})"),
            Event(R"({"usage":{"prompt_tokens":"5","completion_tokens":1.5,"prompt_tokens_details":7}})"),
            Event("[DONE]")});
  EXPECT_TRUE(reader.whole());
  EXPECT_EQ(reader.output_events(), 0);
  EXPECT_FALSE(reader.usage().prompt_tokens || reader.usage().completion_tokens ||
               reader.usage().cached_tokens);
}

TEST(AnswerReader, CompletionsTimesAndUsage) {
  const AnswerReader reader =
      Read({Event(R"({"choices":[{"text":"a","finish_reason":null}],"usage":null})"),
            Event(R"({"choices":[{"text":"","finish_reason":null}]})"),  // half of a character
            Event(R"({"choices":[{"text":"b","finish_reason":"length"}]})"), Event(kUsage), Event("[DONE]")});
  EXPECT_TRUE(reader.whole() && reader.done());
  EXPECT_EQ(reader.output_events(), 3);
  EXPECT_EQ(reader.first_output(), kBegin + milliseconds(10));
  EXPECT_EQ(reader.last_output(), kBegin + milliseconds(30));
  EXPECT_EQ(reader.gaps_ms(), (std::vector<double>{10, 10}));
  EXPECT_EQ(reader.usage().prompt_tokens, 5);
  EXPECT_EQ(reader.usage().completion_tokens, 3);
  EXPECT_EQ(reader.usage().cached_tokens, 2);
  EXPECT_FALSE(reader.token_ids());
}

TEST(AnswerReader, ChatWithARoleFirstAndAFinishLast) {
  const AnswerReader reader = Read({Event(R"({"choices":[{"delta":{"role":"assistant","content":""}}]})"),
                                    Event(R"({"choices":[{"delta":{"reasoning_content":"hm"}}]})"),
                                    Event(R"({"choices":[{"delta":{"content":"a"}}]})"),
                                    Event(R"({"choices":[{"delta":{},"finish_reason":"stop"}]})")});
  EXPECT_TRUE(reader.whole());
  EXPECT_FALSE(reader.done());  // this server leaves [DONE] out
  EXPECT_EQ(reader.output_events(), 2);
  EXPECT_EQ(reader.first_output(), kBegin + milliseconds(20));
  EXPECT_EQ(reader.last_output(), kBegin + milliseconds(40));
  EXPECT_EQ(reader.gaps_ms(), (std::vector<double>{10}));
}

TEST(AnswerReader, TokenIdsCountWhereTextIsEmpty) {
  const AnswerReader reader =
      Read({Event(R"({"choices":[{"text":"","token_ids":[],"prompt_token_ids":[1]}]})"),
            Event(R"({"choices":[{"text":"","token_ids":[5,6],"finish_reason":null}]})"),
            Event(R"({"choices":[{"text":"","token_ids":[7],"finish_reason":"length"}]})"), Event("[DONE]")});
  EXPECT_EQ(reader.token_ids(), 3);
  EXPECT_EQ(reader.output_events(), 2);
  EXPECT_EQ(reader.first_output(), kBegin + milliseconds(20));
}

TEST(AnswerReader, WhatComesAfterDoneDoesNotCount) {
  const AnswerReader reader = Read({Event(R"({"choices":[{"text":"a"}]})"), Event("[DONE] "),
                                    Event(R"({"choices":[{"text":"b"}],"error":"x"})")});
  EXPECT_TRUE(reader.whole());
  EXPECT_EQ(reader.output_events(), 1);
}

TEST(ErrorText, IsOneShortLine) {
  EXPECT_EQ(ErrorText(R"({"error":{"message":"no\nroom","type":"x"}})"), "no room");
  EXPECT_EQ(ErrorText(R"({"detail":"not here"})"), "not here");
  EXPECT_EQ(ErrorText("plain\r\n\x1b[31mtext"), "plain   [31mtext");
  EXPECT_EQ(ErrorText(""), "");
  EXPECT_LT(ErrorText(std::string(100'000, 'x')).size(), 400u);
}

}  // namespace
}  // namespace minke::cli::bench
