#include "cli/bench/distribution.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <vector>

namespace minke::cli::bench {
namespace {

std::vector<int64_t> Draws(const std::string& spec, int count, uint64_t seed = 1) {
  const absl::StatusOr<LengthDistribution> distribution = LengthDistribution::Parse(spec);
  EXPECT_TRUE(distribution.ok()) << distribution.status();
  std::vector<int64_t> draws;
  for (int i = 0; i < count; ++i) {
    Random random(seed, Draw::kPromptTokens, i);
    draws.push_back(distribution->Sample(random));
  }
  return draws;
}

double Mean(const std::vector<int64_t>& values) {
  double sum = 0;
  for (const int64_t value : values) sum += static_cast<double>(value);
  return sum / static_cast<double>(values.size());
}

class LengthFile {
 public:
  explicit LengthFile(const std::string& text) : path_(::testing::TempDir() + "/lengths.txt") {
    std::ofstream(path_) << text;
  }
  ~LengthFile() { std::filesystem::remove(path_); }
  std::string spec() const { return "file:" + path_; }

 private:
  const std::string path_;
};

TEST(LengthDistribution, RefusesWhatItCannotRead) {
  for (const char* spec : {"",
                           "0",
                           "-1",
                           "x",
                           "1.5",
                           "16777217",
                           "99999999999999999999",
                           "5:",
                           ":5",
                           "5:4",
                           "0:4",
                           "1:2:3",
                           "normal",
                           "normal:5",
                           "normal:5:x",
                           "normal:nan:1",
                           "normal:5:0",
                           "normal:inf:1",
                           "normal:5:1:9",
                           "normal:5:1:9:3",
                           "lognormal:-1:1",
                           "lognormal:5:1:0:3",
                           "zipf:1",
                           "zipf:0:1:5",
                           "zipf:1:5:1",
                           "zipf:1:1:16777216",
                           "poisson:3"}) {
    const absl::Status status = LengthDistribution::Parse(spec).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << spec;
    EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
  }
}

TEST(LengthDistribution, AFileNeedsLengths) {
  EXPECT_EQ(LengthDistribution::Parse("file:/no/such/file").status().code(), absl::StatusCode::kNotFound);
  for (const char* text : {"", "\n\n", "5\n0\n", "5\nsix\n", "1 2\n"})
    EXPECT_EQ(LengthDistribution::Parse(LengthFile(text).spec()).status().code(),
              absl::StatusCode::kInvalidArgument)
        << text;
  LengthFile file("7\n\n 9 \r\n7");
  std::map<int64_t, int> counts;
  for (const int64_t draw : Draws(file.spec(), 30'000)) ++counts[draw];
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_NEAR(counts[7], 20'000, 500);
}

TEST(LengthDistribution, FixedAndUniform) {
  EXPECT_EQ(Draws("128", 3), (std::vector<int64_t>{128, 128, 128}));
  std::map<int64_t, int> counts;
  for (const int64_t draw : Draws("3:6", 40'000)) ++counts[draw];
  ASSERT_EQ(counts.size(), 4u);
  for (const auto& [value, count] : counts) {
    EXPECT_TRUE(value >= 3 && value <= 6);
    EXPECT_NEAR(count, 10'000, 400);
  }
}

TEST(LengthDistribution, NormalHasItsMeanAndStaysInItsRange) {
  const std::vector<int64_t> draws = Draws("normal:500:50", 50'000);
  EXPECT_NEAR(Mean(draws), 500, 1.5);
  double squares = 0;
  for (const int64_t draw : draws) squares += std::pow(static_cast<double>(draw) - 500, 2);
  EXPECT_NEAR(std::sqrt(squares / 50'000), 50, 1.5);
  for (const int64_t draw : Draws("normal:10:100:5:20", 5'000)) EXPECT_TRUE(draw >= 5 && draw <= 20) << draw;
  for (const int64_t draw : Draws("normal:1:100", 5'000)) EXPECT_GE(draw, 1);
  EXPECT_EQ(Draws("normal:10:1:9000:9001", 2),
            (std::vector<int64_t>{9000, 9000}));  // ends, though it never hits
}

TEST(LengthDistribution, LognormalHasItsMedian) {
  std::vector<int64_t> draws = Draws("lognormal:200:0.8", 50'001);
  std::nth_element(draws.begin(), draws.begin() + 25'000, draws.end());
  EXPECT_NEAR(static_cast<double>(draws[25'000]), 200, 5);
  EXPECT_NEAR(Mean(draws), 200 * std::exp(0.8 * 0.8 / 2), 8);
}

TEST(LengthDistribution, ZipfFallsWithTheRank) {
  std::map<int64_t, int> counts;
  for (const int64_t draw : Draws("zipf:1:10:13", 50'000)) ++counts[draw];
  ASSERT_EQ(counts.size(), 4u);
  const double sum = 1 + 1 / 2. + 1 / 3. + 1 / 4.;
  for (int k = 1; k <= 4; ++k) EXPECT_NEAR(counts[9 + k], 50'000 / sum / k, 600) << k;
}

TEST(LengthDistribution, TheSeedDecides) {
  EXPECT_EQ(Draws("1:1000000", 50, 5), Draws("1:1000000", 50, 5));
  EXPECT_NE(Draws("1:1000000", 50, 5), Draws("1:1000000", 50, 6));
}

// Values of another implementation: results of machines and compilers are compared.
TEST(Random, IsTheSameEverywhere) {
  Random random(1, Draw::kPrompt, 2);
  EXPECT_EQ(random.Next(), 15864331276828037103u);
  EXPECT_EQ(random.Next(), 4314553942310054917u);
}

}  // namespace
}  // namespace minke::cli::bench
