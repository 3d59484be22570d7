#include "cli/bench/arrival.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace minke::cli::bench {
namespace {

std::vector<double> Seconds(Arrival arrival, double rate, uint64_t seed, int count) {
  ArrivalProcess process(arrival, rate, seed);
  std::vector<double> times;
  for (int i = 0; i < count; ++i) times.push_back(std::chrono::duration<double>(process.Next()).count());
  return times;
}

TEST(ArrivalProcess, UniformIsEvenlySpacedFromZero) {
  EXPECT_EQ(Seconds(Arrival::kUniform, 4, 1, 5), (std::vector<double>{0, 0.25, 0.5, 0.75, 1}));
  const std::vector<double> times = Seconds(Arrival::kUniform, 3, 1, 300'001);
  EXPECT_NEAR(times.back(), 100'000, 1e-6);  // no drift
}

TEST(ArrivalProcess, PoissonGapsAreExponential) {
  constexpr int kCount = 200'000;
  constexpr double kRate = 50;
  const std::vector<double> times = Seconds(Arrival::kPoisson, kRate, 7, kCount);
  double last = 0, sum = 0, squares = 0;
  int longer_than_mean = 0;
  for (const double time : times) {
    const double gap = time - last;
    ASSERT_GE(gap, 0);
    last = time;
    sum += gap;
    squares += gap * gap;
    longer_than_mean += gap > 1 / kRate;
  }
  const double mean = sum / kCount;
  EXPECT_NEAR(mean * kRate, 1, 0.01);  // its standard error is 1/sqrt(200,000) = 0.0022
  EXPECT_NEAR(std::sqrt(squares / kCount - mean * mean) * kRate, 1, 0.02);
  EXPECT_NEAR(longer_than_mean / double{kCount}, std::exp(-1), 0.005);
}

TEST(ArrivalProcess, TheSeedDecides) {
  EXPECT_EQ(Seconds(Arrival::kPoisson, 9, 3, 100), Seconds(Arrival::kPoisson, 9, 3, 100));
  EXPECT_NE(Seconds(Arrival::kPoisson, 9, 3, 100), Seconds(Arrival::kPoisson, 9, 4, 100));
  EXPECT_EQ(Seconds(Arrival::kUniform, 9, 3, 100), Seconds(Arrival::kUniform, 9, 4, 100));
}

}  // namespace
}  // namespace minke::cli::bench
