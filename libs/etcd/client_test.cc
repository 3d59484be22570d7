// Against the real etcd (Debian's etcd-server).
#include "libs/etcd/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "absl/time/clock.h"
#include "libs/base/mutex.h"
#include "libs/etcd/server_command.h"
#include "libs/etcd/testing/etcd_server.h"

namespace minke::etcd {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

// What a mirror has told so far.
class Copy {
 public:
  Mirror::Events Events() {
    return {.changed =
                [this](const Mirror::Change& change) {
                  const MutexLock lock(mutex_);
                  if (change.snapshot) keys_.clear(), ++snapshots_;
                  for (const KeyValue& kv : change.put) keys_[kv.key] = kv.value;
                  for (const std::string& key : change.deleted) keys_.erase(key);
                },
            .lost =
                [this](const absl::Status&) {
                  const MutexLock lock(mutex_);
                  ++losses_;
                }};
  }
  template <typename Condition>
  bool Await(const Condition& condition, absl::Duration timeout = absl::Seconds(10)) {
    const MutexLock lock(mutex_);
    return mutex_.AwaitFor(timeout, [&] { return condition(keys_); });
  }
  bool AwaitLosses(int losses) {
    const MutexLock lock(mutex_);
    return mutex_.AwaitFor(absl::Seconds(10), [&] { return losses_ >= losses; });
  }
  int snapshots() {
    const MutexLock lock(mutex_);
    return snapshots_;
  }
  std::map<std::string, std::string> keys() {
    const MutexLock lock(mutex_);
    return keys_;
  }

 private:
  Mutex mutex_;
  std::map<std::string, std::string> keys_;
  int snapshots_ = 0, losses_ = 0;
};

auto Has(const std::string& key, const std::string& value) {
  return [=](const auto& keys) {
    auto it = keys.find(key);
    return it != keys.end() && it->second == value;
  };
}
auto Lacks(const std::string& key) {
  return [=](const auto& keys) { return !keys.contains(key); };
}

TEST(EtcdClient, NobodyThereIsUnavailableWithinTheDeadline) {
  const int port = *FreePort();
  Client client({.endpoints = {"127.0.0.1:" + std::to_string(port)}, .call_timeout = absl::Seconds(1)});
  const absl::Time begin = absl::Now();
  const absl::Status status = client.Get("/a").status();
  EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) << status;
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
}

TEST(EtcdClient, FrozenServerIsADeadlineNotAHang) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}, .call_timeout = absl::Milliseconds(300)});
  ASSERT_TRUE(client.Put("/a", "1").ok());
  server.Freeze();
  EXPECT_TRUE(absl::IsDeadlineExceeded(client.Get("/a").status()));
  server.Thaw();
  for (int i = 0; i < 50 && !client.Get("/a").ok(); ++i) absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(client.Get("/a")->keys.at(0).value, "1");
}

TEST(EtcdClient, GoesToTheNextEndpoint) {
  EtcdServer server;
  const int nobody = *FreePort();
  Client client({.endpoints = {"127.0.0.1:" + std::to_string(nobody), server.address()}});
  ASSERT_TRUE(client.Put("/a", "1").ok());
  EXPECT_EQ(client.Get("/a")->keys.at(0).value, "1");
}

TEST(EtcdClient, ReadsWhatItWrote) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}});
  EXPECT_TRUE(client.Get("/a")->keys.empty());
  const int64_t first = *client.Put("/a", "1");
  const int64_t second = *client.Put("/a", std::string("\0\xff", 2));
  ASSERT_TRUE(client.Put("/ab", "3").ok());
  ASSERT_TRUE(client.Put("/b", "4").ok());
  const auto got = client.GetPrefix("/a");
  ASSERT_TRUE(got.ok());
  ASSERT_EQ(got->keys.size(), 2u);
  EXPECT_EQ(got->keys[0].value, std::string("\0\xff", 2));
  EXPECT_EQ(got->keys[0].create_revision, first);
  EXPECT_EQ(got->keys[0].mod_revision, second);
  EXPECT_EQ(got->revision, second + 2);
}

TEST(EtcdClient, TransactionsCompareAndSwap) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}});
  const auto created = client.Commit(Transaction().IfCreated("/a", 0).Put("/a", "1").OtherwiseGet("/a"));
  ASSERT_TRUE(created.ok()) << created.status();
  EXPECT_TRUE(created->succeeded);
  const auto again = client.Commit(Transaction().IfCreated("/a", 0).Put("/a", "2").OtherwiseGet("/a"));
  EXPECT_FALSE(again->succeeded);
  ASSERT_EQ(again->got.size(), 1u);
  EXPECT_EQ(again->got[0].value, "1");
  EXPECT_EQ(again->got[0].create_revision, created->revision);
  EXPECT_TRUE(client.Commit(Transaction().IfModified("/a", created->revision).Put("/a", "3"))->succeeded);
  EXPECT_FALSE(client.Commit(Transaction().IfModified("/a", created->revision).Put("/a", "4"))->succeeded);
  EXPECT_FALSE(client.Commit(Transaction().IfValue("/a", "1").Delete("/a"))->succeeded);
  EXPECT_FALSE(client.Commit(Transaction().IfValue("/none", "1").Delete("/a"))->succeeded);
  EXPECT_FALSE(client.Commit(Transaction().IfNoneUnder("/").Put("/b", "1"))->succeeded);
  EXPECT_TRUE(client.Commit(Transaction().IfNoneUnder("/a/").Put("/b", "1"))->succeeded);
  EXPECT_TRUE(client.Commit(Transaction().IfValue("/a", "3").Delete("/a"))->succeeded);
  EXPECT_TRUE(client.Get("/a")->keys.empty());
}

TEST(EtcdLease, HoldsItsKeysWhileItLives) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}});
  {
    auto lease = Lease::Grant(client, absl::Seconds(2));
    ASSERT_TRUE(lease.ok()) << lease.status();
    ASSERT_TRUE(client.Put("/a", "1", (*lease)->id()).ok());
    absl::SleepFor(absl::Seconds(5));  // more than twice the lease
    EXPECT_TRUE((*lease)->alive());
    EXPECT_EQ(client.Get("/a")->keys.size(), 1u);
  }
  EXPECT_TRUE(client.Get("/a")->keys.empty()) << "revoked with the object";
}

TEST(EtcdLease, KnowsThatItIsGone) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}});
  auto lease = *Lease::Grant(client, absl::Seconds(2));
  ASSERT_TRUE(client.RevokeLease(lease->id()).ok());
  for (int i = 0; i < 50 && !lease->expired(); ++i) absl::SleepFor(absl::Milliseconds(100));
  EXPECT_TRUE(lease->expired());
  EXPECT_FALSE(lease->alive());
  EXPECT_TRUE(absl::IsNotFound(client.Put("/a", "1", lease->id()).status()));
}

TEST(EtcdLease, IsNotAliveWhileNobodyConfirmsIt) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}, .call_timeout = absl::Milliseconds(300)});
  auto lease = *Lease::Grant(client, absl::Seconds(2));
  server.Kill();
  absl::SleepFor(absl::Seconds(3));
  EXPECT_FALSE(lease->alive());
  EXPECT_FALSE(lease->expired());
  server.StartAgain(/*with_data=*/true);  // which grants every lease its whole time anew
  for (int i = 0; i < 50 && !lease->alive(); ++i) absl::SleepFor(absl::Milliseconds(100));
  EXPECT_TRUE(lease->alive());
}

TEST(EtcdMirror, FollowsPutsAndDeletes) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}});
  ASSERT_TRUE(client.Put("/x/a", "1").ok());
  ASSERT_TRUE(client.Put("/y", "1").ok());
  Copy copy;
  Mirror mirror(client, "/x/", copy.Events());
  ASSERT_TRUE(copy.Await(Has("/x/a", "1")));
  ASSERT_TRUE(client.Put("/x/b", "2").ok());
  ASSERT_TRUE(client.Put("/y", "2").ok());
  ASSERT_TRUE(client.Commit(Transaction().Delete("/x/a").Put("/x/c", "3")).ok());
  EXPECT_TRUE(copy.Await(Has("/x/c", "3")));
  EXPECT_THAT(copy.keys(), UnorderedElementsAre(Pair("/x/b", "2"), Pair("/x/c", "3")));
  EXPECT_EQ(copy.snapshots(), 1);
}

TEST(EtcdMirror, SurvivesARestartWithAndWithoutData) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}});
  Copy copy;
  Mirror mirror(client, "/x/", copy.Events());
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(client.Put("/x/a", std::to_string(i)).ok());
  ASSERT_TRUE(copy.Await(Has("/x/a", "19")));
  server.Kill();
  ASSERT_TRUE(copy.AwaitLosses(1));
  EXPECT_THAT(copy.keys(), ElementsAre(Pair("/x/a", "19"))) << "what was known stays";
  server.StartAgain(/*with_data=*/true);
  ASSERT_TRUE(client.Put("/x/b", "1").ok());
  EXPECT_TRUE(copy.Await(Has("/x/b", "1")));
  EXPECT_TRUE(copy.Await(Has("/x/a", "19")));
  server.Kill();
  ASSERT_TRUE(copy.AwaitLosses(2));
  server.StartAgain(/*with_data=*/false);  // revisions begin at 1 again, far below those already seen
  ASSERT_TRUE(client.Put("/x/c", "1").ok());
  EXPECT_TRUE(copy.Await(Has("/x/c", "1")));
  EXPECT_TRUE(copy.Await(Lacks("/x/a")));
}

TEST(EtcdMirror, HistoryCompactedAwayMeanwhileIsNotNeeded) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}});
  Copy copy;
  Mirror mirror(client, "/x/", copy.Events());
  ASSERT_TRUE(copy.Await(Lacks("/x/a")));
  server.Freeze();  // the connection breaks only when pings go unanswered, or a call does
  EXPECT_FALSE(client.Get("/x/a").ok());
  ASSERT_TRUE(copy.AwaitLosses(1));
  server.Thaw();
  int64_t last = 0;
  for (int i = 0; i < 100; ++i) {
    if (const auto put = client.Put("/x/a", std::to_string(i)); put.ok()) last = *put;
  }
  ASSERT_TRUE(client.Compact(last).ok());
  EXPECT_TRUE(copy.Await(Has("/x/a", "99")));
}

TEST(EtcdMirror, MovesToAnotherEndpointWithTheCalls) {
  EtcdServer first, second;  // two clusters of one, so that one can tell where the mirror looks
  Client client({.endpoints = {first.address(), second.address()}, .call_timeout = absl::Milliseconds(300)});
  Client other({.endpoints = {second.address()}});
  ASSERT_TRUE(other.Put("/x/second", "1").ok());
  Copy copy;
  Mirror mirror(client, "/x/", copy.Events());
  ASSERT_TRUE(client.Put("/x/first", "1").ok());
  ASSERT_TRUE(copy.Await(Has("/x/first", "1")));
  first.Freeze();
  EXPECT_TRUE(client.Get("/x/second").ok());
  EXPECT_TRUE(copy.Await(Has("/x/second", "1")));
}

TEST(EtcdMirror, StopsAtOnceWhileNobodyAnswers) {
  EtcdServer server;
  Client client({.endpoints = {server.address()}, .call_timeout = absl::Seconds(30)});
  Copy copy;
  auto mirror = std::make_unique<Mirror>(client, "/x/", copy.Events());
  server.Freeze();
  absl::SleepFor(absl::Milliseconds(200));
  const absl::Time begin = absl::Now();
  mirror.reset();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
}

}  // namespace
}  // namespace minke::etcd
