#include "libs/collective/local_group.h"

#include <atomic>
#include <random>
#include <thread>

#include "gtest/gtest.h"

namespace minke {
namespace {

template <class Body>
void OnRanks(int size, Body body) {
  const auto group = MakeLocalGroup(size);
  std::vector<std::jthread> threads;
  for (const auto& rank : group) threads.emplace_back([&body, rank = rank.get()] { body(*rank); });
}

TEST(LocalGroup, RankThatStaysAwayIsNotWaitedForForever) {
  const auto group = MakeLocalGroup(2, absl::Milliseconds(50));
  float value = 1;
  EXPECT_EQ(group[0]->AllReduceSum({&value, 1}).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(LocalGroup, SumsHaveTheSameBitsOnAllRanksInTheOrderOfRanks) {
  for (const int size : {1, 2, 3, 4, 8}) {
    constexpr int kRounds = 200;
    std::vector<std::vector<std::vector<float>>> results(size, std::vector<std::vector<float>>(kRounds));
    const auto input = [](int rank, int round) {
      std::mt19937 rng(1000 * rank + round);
      std::vector<float> values(round % 17 == 0 ? round / 17 : 1 + round);
      for (float& v : values) v = std::uniform_real_distribution<float>(-1, 1)(rng);
      return values;
    };
    OnRanks(size, [&](Collective& rank) {
      ASSERT_EQ(rank.size(), size);
      for (int round = 0; round < kRounds; ++round) {
        std::vector<float> values = input(rank.rank(), round);
        ASSERT_TRUE(rank.AllReduceSum(values).ok());
        results[rank.rank()][round] = values;
      }
    });
    for (int round = 0; round < kRounds; ++round) {
      std::vector<float> want = input(0, round);
      for (int rank = 1; rank < size; ++rank) {
        const std::vector<float> more = input(rank, round);
        for (size_t i = 0; i < want.size(); ++i) want[i] += more[i];
      }
      for (int rank = 0; rank < size; ++rank)
        ASSERT_EQ(results[rank][round], want) << "rank " << rank << " of " << size;
    }
  }
}

TEST(LocalGroup, BroadcastReachesAll) {
  std::atomic<int> right{0};
  OnRanks(4, [&](Collective& rank) {
    for (int root = 0; root < 4; ++root) {
      std::vector<std::byte> bytes(1000, static_cast<std::byte>(rank.rank()));
      ASSERT_TRUE(rank.Broadcast(bytes, root).ok());
      right += bytes == std::vector<std::byte>(1000, static_cast<std::byte>(root));
    }
  });
  EXPECT_EQ(right, 16);
}

}  // namespace
}  // namespace minke
