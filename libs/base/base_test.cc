#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "libs/base/dtype.h"
#include "libs/base/ids.h"
#include "libs/base/json_depth.h"
#include "libs/base/log.h"
#include "libs/base/thread_pool.h"

namespace minke {
namespace {

TEST(BF16, RoundsToNearestEven) {
  EXPECT_EQ(F32ToBF16(1.0f), 0x3f80);
  EXPECT_EQ(F32ToBF16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // tie, even below
  EXPECT_EQ(F32ToBF16(std::bit_cast<float>(0x3f818000u)), 0x3f82);  // tie, even above
  EXPECT_EQ(F32ToBF16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_EQ(F32ToBF16(std::numeric_limits<float>::infinity()), 0x7f80);
  EXPECT_TRUE(std::isnan(BF16ToF32(F32ToBF16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(F16, WidensEveryValue) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const float got = F16ToF32(static_cast<uint16_t>(bits));
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(got));
    } else if (exponent == 31) {
      EXPECT_EQ(got, sign * std::numeric_limits<float>::infinity());
    } else {
      const float want = exponent == 0 ? std::ldexp(float(mantissa), -24)
                                       : std::ldexp(float(mantissa + 1024), exponent - 25);
      EXPECT_EQ(got, sign * want) << bits;
    }
  }
}

TEST(JsonDepth, CountsBracketsThatAreOpenAtOnce) {
  const std::string deep = std::string(64, '[') + std::string(64, ']');
  EXPECT_FALSE(NestsTooDeep(deep));
  EXPECT_TRUE(NestsTooDeep("{\"a\":" + deep + "}"));
  EXPECT_TRUE(NestsTooDeep(std::string(100'000, '{')));
  EXPECT_FALSE(NestsTooDeep("[" + std::string(100, '{').replace(1, 98, "}") + "]")) << "no JSON, but shallow";
  std::string wide;
  for (int i = 0; i < 1000; ++i) wide += "[],";
  EXPECT_FALSE(NestsTooDeep(wide));
  EXPECT_FALSE(NestsTooDeep("\"" + std::string(100, '[') + "\""));
  EXPECT_FALSE(NestsTooDeep("\"\\\"" + std::string(100, '[') + "\"")) << "an escaped quote ends no string";
  EXPECT_TRUE(NestsTooDeep("\"\\\\\"" + std::string(100, '[')));
  EXPECT_FALSE(NestsTooDeep("\"\\"));
}

TEST(Ids, AreNeverZeroAndDiffer) {
  EXPECT_NE(RandomNodeId(), RandomNodeId());
  EXPECT_NE(RandomNodeId().value, 0u);
}

TEST(ThreadPool, RunsEveryIndexExactlyOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 2000; ++round) {
      const int64_t n = round % 37;
      std::vector<int> count(n, 0);
      pool.ParallelFor(n, [&](int64_t i) { ++count[i]; });
      EXPECT_EQ(std::accumulate(count.begin(), count.end(), 0), n);
      for (int c : count) ASSERT_EQ(c, 1);
    }
  }
}

// A worker between looking at whether to stop and at what to wait for once missed both.
TEST(ThreadPool, EndsWhateverItsWorkersAreAt) {
  for (int round = 0; round < 3000; ++round) {
    ThreadPool pool(6);
    if (round % 2 == 0) pool.ParallelFor(2, [](int64_t) {});
  }
}

TEST(Log, TextQuotesWhatWouldNotReadAsOneValue) {
  const log::Field fields[] = {{"n", 7},         {"ms", 1.25},  {"ok", true},
                               {"plain", "abc"}, {"empty", ""}, {"spaced", "a b\"c"}};
  EXPECT_EQ(log::FormatText("gateway", "tag", "done", fields, std::size(fields)),
            "gateway [tag] done n=7 ms=1.250 ok=true plain=abc empty=\"\" spaced=\"a b\\\"c\"");
}

TEST(Log, ALineStaysALine) {
  const log::Field fields[] = {{"evil", "x\n2026 info [auth] \x1b[31m"}};
  const std::string text = log::FormatText("", "tag", "a\nb\r", fields, 1);
  EXPECT_EQ(text, "[tag] a\\nb\\u000d evil=\"x\\n2026 info [auth] \\u001b[31m\"");
  const std::string json = log::FormatJson("T", log::Level::kInfo, "", "tag", "a\nb", fields, 1);
  EXPECT_EQ(json,
            "{\"time\":\"T\",\"level\":\"info\",\"tag\":\"tag\",\"message\":\"a\\nb\","
            "\"evil\":\"x\\n2026 info [auth] \\u001b[31m\"}");
}

TEST(Log, JsonIsJsonWhateverTheBytes) {
  const std::string bytes = "\xff\xc0\x80 \xe2\x82\xac \xed\xa0\x80\"\\";
  const log::Field fields[] = {{"n", -7}, {"nan", std::nan("")}, {"ok", false}, {"bytes", bytes}};
  EXPECT_EQ(log::FormatJson("T", log::Level::kError, "router", "t", "m", fields, std::size(fields)),
            "{\"time\":\"T\",\"level\":\"error\",\"process\":\"router\",\"tag\":\"t\",\"message\":\"m\","
            "\"n\":-7,\"nan\":null,\"ok\":false,"
            "\"bytes\":\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd \xe2\x82\xac "
            "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\\\"\\\\\"}");
}

}  // namespace
}  // namespace minke
