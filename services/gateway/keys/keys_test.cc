#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/gateway/keys/api_keys.h"

namespace minke::gateway {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(KeyFile, ReadsKeysNamesAndLimits) {
  const auto entries = ParseKeys(
      "# team a\nsk-one\n\n  sk-two\tname=b.2 requests_per_minute=60 tokens_per_minute=90000 "
      "concurrency=4\r\n"
      "sk-three",
      KeyKind::kApiKey);
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 3u);
  EXPECT_EQ((*entries)[0].key, "sk-one");
  EXPECT_EQ((*entries)[0].name, "key-1");
  EXPECT_EQ((*entries)[0].limits, KeyLimits{});
  EXPECT_EQ((*entries)[1].name, "b.2");
  EXPECT_EQ((*entries)[1].limits, (KeyLimits{60, 90000, 4}));
  EXPECT_EQ((*entries)[2].name, "key-3");
}

TEST(KeyFile, ErrorsNameTheLineAndNeverAKey) {
  const std::pair<const char*, const char*> bad[] = {
      {"", "expected one API key per line, found none"},
      {"# nobody", "expected one API key per line, found none"},
      {"sk-SECRET\nsk-SECRET", "line 2: the same API key stands on another line"},
      {"sk-SECRET more-SECRET", "line 1: expected a key, then name="},
      {"sk-SECRET name=", "line 1: name: expected 1 to 64 letters"},
      {"sk-SECRET name=a\"b", "line 1: name: expected"},
      {"a name=x\nsk-SECRET name=x", "line 2: name: expected another than 'x'"},
      {"sk-SECRET concurrency=0", "line 1: concurrency: expected a whole number from 1"},
      {"sk-SECRET requests_per_minute=ten", "found 'ten'"},
      {"sk-SECRET tokens_per_minute=-1", "found '-1'"},
      {"sk-SECRET tokens_per_minute", "found ''"},
  };
  for (const auto& [text, message] : bad) {
    const auto entries = ParseKeys(text, KeyKind::kApiKey);
    ASSERT_FALSE(entries.ok()) << text;
    EXPECT_THAT(std::string(entries.status().message()), HasSubstr(message));
    EXPECT_THAT(std::string(entries.status().message()), Not(HasSubstr("SECRET")));
  }
  EXPECT_FALSE(ParseKeys("t concurrency=1", KeyKind::kOperatorToken).ok());
  EXPECT_TRUE(ParseKeys("t name=ann", KeyKind::kOperatorToken).ok());
}

TEST(MinuteBudget, FillsEvenlyAndMayBeOverdrawn) {
  MinuteBudget budget(60);
  auto now = MinuteBudget::Clock::now() + seconds(1);
  EXPECT_EQ(budget.Left(now), 60);
  budget.Take(60, now);
  EXPECT_EQ(budget.Wait(1, now), milliseconds(1000));
  now += milliseconds(999);
  EXPECT_GT(budget.Wait(1, now), milliseconds(0));
  now += milliseconds(2);
  EXPECT_EQ(budget.Wait(1, now), milliseconds(0));
  budget.Take(31, now);  // 30 below zero
  EXPECT_NEAR(static_cast<double>(budget.Wait(1, now).count()), 31'000, 2);
  EXPECT_EQ(budget.Left(now), 0);
  EXPECT_EQ(budget.Left(now + seconds(10'000)), 60);
  EXPECT_EQ(budget.Left(now), 60);  // a clock that seems to go back takes nothing
}

TEST(MinuteBudget, WhatCostsMoreThanAMinuteWaitsForAFullOne) {
  MinuteBudget budget(100);
  const auto now = MinuteBudget::Clock::now() + seconds(1);
  EXPECT_EQ(budget.Wait(1'000'000, now), milliseconds(0));
  budget.Take(50, now);
  EXPECT_EQ(budget.Wait(1'000'000, now), milliseconds(30'000));
  EXPECT_EQ(MinuteBudget(0).Wait(1'000'000, now), milliseconds(0));  // no limit
}

TEST(KeyAccount, HoldsItsLimits) {
  const auto account =
      std::make_shared<KeyAccount>("a", KeyLimits{.requests_per_minute = 3, .concurrency = 2});
  const auto now = KeyAccount::Clock::now() + seconds(1);
  auto first = account->Begin(1, 10, now), second = account->Begin(1, 10, now);
  ASSERT_TRUE(std::holds_alternative<KeyAccount::Permit>(first));
  ASSERT_TRUE(std::holds_alternative<KeyAccount::Permit>(second));
  const auto third = account->Begin(1, 10, now);
  ASSERT_TRUE(std::holds_alternative<KeyRefusal>(third));
  EXPECT_THAT(std::get<KeyRefusal>(third).message, HasSubstr("2 sequences at once"));
  EXPECT_TRUE(std::holds_alternative<KeyRefusal>(account->Peek(now)));
  first = KeyRefusal{};  // its sequences end
  EXPECT_TRUE(std::holds_alternative<std::monostate>(account->Peek(now)));
  auto fourth = account->Begin(1, 10, now);
  ASSERT_TRUE(std::holds_alternative<KeyAccount::Permit>(fourth));
  second = KeyRefusal{};
  const auto fifth = account->Begin(1, 10, now);
  ASSERT_TRUE(std::holds_alternative<KeyRefusal>(fifth));
  EXPECT_THAT(std::get<KeyRefusal>(fifth).message, HasSubstr("3 requests per minute"));
  EXPECT_EQ(std::get<KeyRefusal>(fifth).code, "rate_limit_exceeded");
  EXPECT_EQ(std::get<KeyRefusal>(fifth).retry_after_s, 20);
  EXPECT_TRUE(std::holds_alternative<KeyAccount::Permit>(account->Begin(1, 10, now + seconds(21))));
}

TEST(KeyAccount, CountsPromptsAndGeneratedTokens) {
  const auto account = std::make_shared<KeyAccount>("a", KeyLimits{.tokens_per_minute = 100});
  const auto now = KeyAccount::Clock::now();
  auto begun = account->Begin(2, 40, now);
  auto& permit = std::get<KeyAccount::Permit>(begun);
  EXPECT_THAT(permit.Headers(), ::testing::ElementsAre(std::pair("x-ratelimit-limit-tokens", "100"),
                                                       std::pair("x-ratelimit-remaining-tokens", "60")));
  permit.Generated(200);
  const auto refused = account->Begin(1, 1, KeyAccount::Clock::now());
  ASSERT_TRUE(std::holds_alternative<KeyRefusal>(refused));
  EXPECT_NEAR(std::get<KeyRefusal>(refused).retry_after_s, 85, 2);  // 140 below zero, and 1
  telemetry::Page page;
  account->Collect(page);
  const std::string text = telemetry::RenderText(page);
  for (const char* line :
       {"minke:key_requests_total{key=\"a\"} 1", "minke:key_prompt_tokens_total{key=\"a\"} 40",
        "minke:key_completion_tokens_total{key=\"a\"} 200", "minke:key_sequences{key=\"a\"} 2",
        "minke:key_refused_total{key=\"a\",limit=\"tokens\"} 1"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(KeyAccount, ADefaultPermitKnowsNoLimit) {
  KeyAccount::Permit permit;
  permit.Generated(5);
  EXPECT_TRUE(permit.Headers().empty());
}

class ApiKeysTest : public ::testing::Test {
 protected:
  ~ApiKeysTest() override { std::filesystem::remove(path_); }
  // As a new file, so that it has changed whatever the clock's steps are.
  void Write(const std::string& text) {
    std::ofstream(path_ + ".new") << text;
    std::filesystem::rename(path_ + ".new", path_);
  }
  // After the pause in which nobody looks.
  bool EventuallyAllows(ApiKeys* keys, const char* authorization, bool want) {
    for (int i = 0; i < 500 && Allows(keys, authorization) != want; ++i)
      std::this_thread::sleep_for(milliseconds(10));
    return Allows(keys, authorization) == want;
  }
  const std::string path_ =
      (std::filesystem::temp_directory_path() / ("minke-keys-" + std::to_string(::getpid()))).string();
};

TEST_F(ApiKeysTest, OnlyTheKeysOfTheFileAreAllowed) {
  Write("# team a\nsk-one\n\nsk-two\r\n");
  const auto keys = ApiKeys::Load(path_, KeyKind::kApiKey);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(Allows(keys->get(), "Bearer sk-one"));
  EXPECT_TRUE(Allows(keys->get(), "bEARER   sk-two "));
  for (const char* bad :
       {"", "Bearer ", "sk-one", "Bearer sk-on", "Bearer sk-one2", "Bearer # team a", "Basic sk-one"}) {
    EXPECT_FALSE(Allows(keys->get(), bad)) << bad;
  }
  EXPECT_TRUE(Allows(nullptr, ""));
  Write("# nobody\n");
  EXPECT_FALSE(ApiKeys::Load(path_, KeyKind::kApiKey).ok());
  std::filesystem::remove(path_);
  EXPECT_FALSE(ApiKeys::Load(path_, KeyKind::kApiKey).ok());
}

TEST_F(ApiKeysTest, AChangedFileIsReadAgainAndABrokenOneChangesNothing) {
  Write("sk-one name=a concurrency=1\nsk-two\n");
  const auto keys = *ApiKeys::Load(path_, KeyKind::kApiKey);
  const auto account = keys->Find("Bearer sk-one");
  auto running = account->Begin(1, 1, KeyAccount::Clock::now());
  Write("sk-one name=a concurrency=1\nsk-three\n");
  EXPECT_TRUE(EventuallyAllows(keys.get(), "Bearer sk-three", true));
  EXPECT_FALSE(Allows(keys.get(), "Bearer sk-two"));
  EXPECT_EQ(keys->Find("Bearer sk-one"), account);  // what it uses goes on counting
  EXPECT_TRUE(std::holds_alternative<KeyRefusal>(account->Begin(1, 1, KeyAccount::Clock::now())));
  for (const char* broken : {"", "sk-one concurrency=none"}) {
    Write(broken);
    std::this_thread::sleep_for(milliseconds(1100));
    EXPECT_TRUE(Allows(keys.get(), "Bearer sk-three")) << broken;
  }
  std::filesystem::remove(path_);
  std::this_thread::sleep_for(milliseconds(1100));
  EXPECT_TRUE(Allows(keys.get(), "Bearer sk-three"));
  Write("sk-one name=a concurrency=5\n");
  EXPECT_TRUE(EventuallyAllows(keys.get(), "Bearer sk-three", false));
  EXPECT_EQ(keys->Find("Bearer sk-one")->limits().concurrency, 5);
}

}  // namespace
}  // namespace minke::gateway
