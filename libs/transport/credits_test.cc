#include "libs/transport/credits.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>

namespace minke::transport::internal {
namespace {

TEST(CreditAccount, TakingMoreThanAvailableTakesNothing) {
  CreditAccount account(10, 1000);
  EXPECT_FALSE(account.Take(11, 0));
  EXPECT_EQ(account.available(), 10u);
  EXPECT_TRUE(account.Take(10, 0));
  EXPECT_FALSE(account.Take(1, 0));
  EXPECT_TRUE(account.Take(0, 0));
}

TEST(CreditAccount, WithoutGrantNothingIsTaken) {
  CreditAccount account;
  EXPECT_FALSE(account.Take(1, 0));
  account.Return(5);
  EXPECT_FALSE(account.Take(1, 0));
}

TEST(CreditAccount, ReturningMoreThanWasTakenIsIgnored) {
  CreditAccount account(10, 1000);
  ASSERT_TRUE(account.Take(4, 0));
  account.Return(1);
  EXPECT_EQ(account.available(), 7u);
  account.Return(UINT32_MAX);
  EXPECT_EQ(account.available(), 10u);
}

TEST(CreditAccount, UnreturnedCreditIsForgivenAfterItsTimeToLive) {
  CreditAccount account(10, 3200);
  ASSERT_TRUE(account.Take(6, 0));
  ASSERT_TRUE(account.Take(4, 1000));
  EXPECT_FALSE(account.Take(1, 3200));
  EXPECT_TRUE(account.Take(1, 3300));  // 3200 and the bucket's width
  EXPECT_EQ(account.available(), 5u);
  EXPECT_EQ(account.forgiven(), 6u);
  EXPECT_TRUE(account.Take(9, 4300));
}

TEST(CreditAccount, InvariantHoldsAndNothingIsForgivenEarlyOrNever) {
  std::mt19937 random(1);
  constexpr int64_t kTtl = 3200;
  constexpr uint32_t kGranted = 100;
  CreditAccount account(kGranted, kTtl);
  std::deque<std::pair<int64_t, uint32_t>> taken;  // the model: exact times
  uint32_t model_taken = 0;
  int64_t now = 0;
  for (int i = 0; i < 200000; ++i) {
    now += random() % 40;
    if (random() % 2 == 0) {
      const uint32_t rows = random() % 8;
      const uint32_t before = account.available();
      const uint64_t forgiven_before = account.forgiven();
      const bool ok = account.Take(rows, now);
      const auto forgiven = static_cast<uint32_t>(account.forgiven() - forgiven_before);
      ASSERT_EQ(account.available(), before + forgiven - (ok ? rows : 0));
      uint32_t rest = forgiven;
      while (rest > 0) {
        ASSERT_FALSE(taken.empty());
        ASSERT_GE(now - taken.front().first, kTtl) << "forgiven early";
        const uint32_t n = std::min(rest, taken.front().second);
        taken.front().second -= n;
        rest -= n;
        model_taken -= n;
        if (taken.front().second == 0) taken.pop_front();
      }
      if (!taken.empty()) {
        ASSERT_LE(now - taken.front().first, kTtl + kTtl / 16) << "forgiven late";
      }
      if (ok && rows > 0) {
        taken.emplace_back(now, rows);
        model_taken += rows;
      }
    } else {
      const uint32_t rows = random() % 5;
      account.Return(rows);
      uint32_t rest = std::min(rows, model_taken);
      model_taken -= rest;
      while (rest > 0) {
        const uint32_t n = std::min(rest, taken.front().second);
        taken.front().second -= n;
        rest -= n;
        if (taken.front().second == 0) taken.pop_front();
      }
    }
    ASSERT_EQ(account.available() + model_taken, kGranted);
  }
  EXPECT_GT(account.forgiven(), 0u);
}

}  // namespace
}  // namespace minke::transport::internal
