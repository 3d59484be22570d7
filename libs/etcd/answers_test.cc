#include "libs/etcd/answers.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::etcd {
namespace {

using ::testing::ElementsAre;

etcdserverpb::Event Event(const char* key, const char* value) {
  etcdserverpb::Event event;
  event.mutable_kv()->set_key(key);
  if (value == nullptr) {
    event.set_type(etcdserverpb::Event::DELETE);
  } else {
    event.mutable_kv()->set_value(value);
  }
  return event;
}

TEST(ChangeOf, OnlyTheLastEventOfAKeyCounts) {
  etcdserverpb::WatchResponse response;
  response.mutable_header()->set_revision(9);
  for (const auto& [key, value] : {std::pair<const char*, const char*>{"b", "1"},
                                   {"a", "1"},
                                   {"b", nullptr},
                                   {"c", nullptr},
                                   {"a", "2"},
                                   {"c", "3"}}) {
    *response.add_events() = Event(key, value);
  }
  const Mirror::Change change = ChangeOf(response);
  EXPECT_FALSE(change.snapshot);
  EXPECT_EQ(change.revision, 9);
  EXPECT_THAT(change.deleted, ElementsAre("b"));
  ASSERT_EQ(change.put.size(), 2u);
  EXPECT_EQ(change.put[0].key + change.put[0].value, "a2");
  EXPECT_EQ(change.put[1].key + change.put[1].value, "c3");
}

TEST(ChangeOf, ManyEventsOfOneMessageTakeNoTimeToSpeakOf) {
  etcdserverpb::WatchResponse response;
  for (int i = 0; i < 200'000; ++i)
    *response.add_events() = Event(std::to_string(i % 100'000).c_str(), i % 2 ? "x" : nullptr);
  const Mirror::Change change = ChangeOf(response);
  EXPECT_EQ(change.put.size() + change.deleted.size(), 100'000u);
}

}  // namespace
}  // namespace minke::etcd
