#include "services/gateway/attention_client/session_health.h"

#include "gtest/gtest.h"

namespace minke::gateway {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kHeartbeat{100};

class SessionHealthTest : public ::testing::Test {
 protected:
  // `beats` of them, each answered after `answer`; then time stands at the last answer.
  void Beat(int beats, milliseconds answer) {
    for (int i = 0; i < beats; ++i) {
      uint64_t beat = 0;
      while ((beat = health_.NextBeat(now_)) == 0) now_ += milliseconds(1);
      now_ += answer;
      health_.Heard(now_, beat);
    }
  }
  // How long from now it may say nothing.
  milliseconds Patience() const {
    milliseconds patience{0};
    while (!health_.silent(now_ + patience)) ++patience;
    return patience - milliseconds(1);
  }

  SessionHealth::Clock::time_point now_ = SessionHealth::Clock::now();
  SessionHealth health_{kHeartbeat, now_};
};

TEST_F(SessionHealthTest, BeatsAreHalfAHeartbeatApartAndOneAtATime) {
  EXPECT_EQ(health_.NextBeat(now_), 1u);
  EXPECT_EQ(health_.NextBeat(now_ + kHeartbeat), 0u);  // the first is not answered
  health_.Heard(now_, 1);
  EXPECT_EQ(health_.NextBeat(now_ + kHeartbeat / 2 - milliseconds(1)), 0u);
  EXPECT_EQ(health_.NextBeat(now_ + kHeartbeat / 2), 2u);
}

TEST_F(SessionHealthTest, OpensWithTheFirstAnswer) {
  EXPECT_FALSE(health_.open());
  health_.Heard(now_, 0);  // an event
  health_.Heard(now_, 1);  // answers what was not asked
  EXPECT_FALSE(health_.open());
  Beat(1, milliseconds(0));
  EXPECT_TRUE(health_.open());
}

TEST_F(SessionHealthTest, SilentAfterTwoHeartbeats) {
  EXPECT_EQ(Patience(), 2 * kHeartbeat);  // from its opening on
  Beat(3, milliseconds(0));
  EXPECT_EQ(Patience(), 2 * kHeartbeat);
  now_ += kHeartbeat;
  health_.Heard(now_, 0);  // any message counts
  EXPECT_EQ(Patience(), 2 * kHeartbeat);
  EXPECT_EQ(health_.silence(now_ + milliseconds(7)), milliseconds(7));
}

TEST_F(SessionHealthTest, SlowHostGetsMoreTimeUntilItIsQuickAgain) {
  Beat(1, milliseconds(150));
  EXPECT_EQ(Patience(), 2 * (kHeartbeat + milliseconds(150)));
  Beat(1, milliseconds(10));
  EXPECT_GT(Patience(), 2 * (kHeartbeat + milliseconds(140)));  // forgotten slowly
  Beat(100, milliseconds(0));
  EXPECT_LE(Patience(), 2 * kHeartbeat + milliseconds(1));
}

// Each thaw is a slow answer; freezes that follow each other must not each take twice as long to be found.
TEST_F(SessionHealthTest, FreezesDoNotMakeItBlind) {
  for (int i = 0; i < 10; ++i) Beat(1, Patience() + milliseconds(1));
  EXPECT_EQ(Patience(), 2 * (1 + SessionHealth::kSlowMaxHeartbeats) * kHeartbeat);
}

TEST_F(SessionHealthTest, WhatThisProcessSleptThroughIsNoSilence) {
  Beat(1, milliseconds(0));
  now_ += 10 * kHeartbeat;
  EXPECT_TRUE(health_.silent(now_));
  health_.Excuse(now_);
  EXPECT_EQ(Patience(), 2 * kHeartbeat);
}

}  // namespace
}  // namespace minke::gateway
