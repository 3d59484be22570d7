#include "cli/bench/sse_parser.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace minke::cli::bench {
namespace {

using Events = std::vector<std::pair<std::string, std::string>>;  // name, data

// Feeds the pieces one after the other.
Events Parse(const std::vector<std::string>& pieces) {
  SseParser parser;
  Events events;
  const auto take = [&](const SseEvent& event) { events.emplace_back(event.name, event.data); };
  for (const std::string& piece : pieces) EXPECT_TRUE(parser.Feed(piece, take));
  parser.Finish(take);
  return events;
}

constexpr char kOdd[] =
    "\xef\xbb\xbf"
    "data: one\n\n"               // with a space
    "data:two\r\n\r\n"            // without, CRLF
    ": a comment\n:\n\n"          // comments alone make no event
    "data:  three\r\r"            // CR; only the first space goes
    "id: 7\nretry: 10\ndata\n\n"  // unknown fields; data without a colon is an empty line
    "event: error\ndata: {\"a\":\n: between\ndata: 1}\n\n"
    "error: {\"code\":500}\n\n"
    "data: f\xc3\xbcr\n\n\n\n"
    "data: [DONE]";  // and no line end
const Events kOddEvents = {{"", "one"},
                           {"", "two"},
                           {"", " three"},
                           {"", ""},
                           {"error", "{\"a\":\n1}"},
                           {"error", "{\"code\":500}"},
                           {"", "f\xc3\xbcr"},
                           {"", "[DONE]"}};

TEST(SseParser, WholeStream) { EXPECT_EQ(Parse({kOdd}), kOddEvents); }

TEST(SseParser, SplitAtEveryByte) {
  const std::string odd = kOdd;
  for (size_t i = 0; i <= odd.size(); ++i) {
    ASSERT_EQ(Parse({odd.substr(0, i), odd.substr(i)}), kOddEvents) << i;
    for (size_t j = i; j <= odd.size(); ++j)
      ASSERT_EQ(Parse({odd.substr(0, i), odd.substr(i, j - i), odd.substr(j)}), kOddEvents) << i << " " << j;
  }
}

TEST(SseParser, ByteByByte) {
  std::vector<std::string> bytes;
  for (const char c : std::string(kOdd)) bytes.emplace_back(1, c);
  EXPECT_EQ(Parse(bytes), kOddEvents);
}

TEST(SseParser, AnEventWithoutEndIsGivenUp) {
  SseParser parser;
  const auto ignore = [](const SseEvent&) {};
  const std::string mebibyte(1 << 20, 'x');
  int fed = 0;
  while (fed < 100 && parser.Feed(mebibyte, ignore)) ++fed;
  EXPECT_EQ(fed, 16);
}

TEST(SseParser, NothingIsNoEvent) {
  EXPECT_EQ(Parse({""}), Events{});
  EXPECT_EQ(Parse({"\n\r\n\r"}), Events{});
  EXPECT_EQ(Parse({"event: x\n\n"}), Events{});
}

}  // namespace
}  // namespace minke::cli::bench
