// One suite of behaviour for every transport.
#include "libs/transport/transport.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "libs/transport/faulty/faulty.h"
#include "libs/transport/inproc/inproc.h"
#include "libs/transport/testing/host_row_memory.h"
#include "libs/transport/ucx/ucx.h"
#include "libs/wire/messages.h"

namespace minke::transport {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using wire::TrafficClass;

// A transport and what it reported.
struct Node {
  std::unique_ptr<Transport> transport;
  std::vector<NodeId> up;
  std::vector<std::pair<NodeId, absl::Status>> lost;
  std::vector<FrameRef> frames;
  std::function<void(Event&)> on_frame;  // instead of keeping it

  Transport* operator->() { return transport.get(); }
  NodeId id() const { return transport->self(); }

  int Poll() {
    return transport->Poll([&](Event& event) {
      switch (event.kind) {
        case Event::Kind::kFrame:
          EXPECT_EQ(event.reason, absl::OkStatus());
          if (on_frame) {
            on_frame(event);
          } else {
            frames.push_back(event.frame);
          }
          break;
        case Event::Kind::kPeerUp:
          up.push_back(event.peer);
          break;
        case Event::Kind::kPeerLost:
          lost.emplace_back(event.peer, event.reason);
          break;
      }
    });
  }
};

// Polls all in turn until `done`; false if that took too long.
bool Pump(std::initializer_list<Node*> nodes, const std::function<bool()>& done,
          absl::Duration limit = absl::Seconds(20)) {
  const absl::Time deadline = absl::Now() + limit;
  while (!done()) {
    int events = 0;
    for (Node* node : nodes) events += node->Poll();
    if (events == 0) {
      if (absl::Now() > deadline) return false;
      std::this_thread::yield();
    }
  }
  return true;
}

void PumpFor(std::initializer_list<Node*> nodes, absl::Duration duration) {
  Pump(
      nodes, [end = absl::Now() + duration] { return absl::Now() > end; }, absl::InfiniteDuration());
}

FrameRef MakeFrame(Transport& transport, uint32_t bytes, TrafficClass traffic_class, uint32_t seed) {
  FrameRef frame = transport.frames().Allocate(bytes);
  frame.header().kind = wire::Kind::kPartial;
  frame.header().traffic_class = traffic_class;
  frame.header().origin = transport.self().value;
  frame.header().step = 1000 + seed;
  frame.header().rows = seed;
  std::mt19937 random(seed);
  for (uint32_t i = 0; i < bytes; ++i) frame.payload()[i] = static_cast<std::byte>(random());
  return frame;
}

void ExpectIntact(const FrameRef& frame, NodeId from) {
  const wire::FrameHeader& header = frame.header();
  EXPECT_EQ(header.magic, wire::kMagic);
  EXPECT_EQ(header.kind, wire::Kind::kPartial);
  EXPECT_EQ(header.origin, from.value);
  EXPECT_EQ(header.step, 1000 + header.rows);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(frame.payload()) % 64, 0u);
  std::mt19937 random(header.rows);
  for (uint32_t i = 0; i < header.payload_bytes; ++i) {
    ASSERT_EQ(frame.payload()[i], static_cast<std::byte>(random()))
        << "byte " << i << " of " << header.payload_bytes;
  }
}

enum class Which { kInproc, kUcxShm, kUcxTcp, kFaultyInproc, kFaultyUcx };

class TransportTest : public ::testing::TestWithParam<Which> {
 protected:
  static bool over_ucx() {
    return GetParam() == Which::kUcxShm || GetParam() == Which::kUcxTcp || GetParam() == Which::kFaultyUcx;
  }

  Identity MakeIdentity() {
    return {.node_id = RandomNodeId(), .role = 3, .model_fingerprint = 42, .cluster_secret = "s3cret"};
  }

  Node Make(Identity identity, TransportOptions options = {}) {
    Node node;
    switch (GetParam()) {
      case Which::kInproc:
      case Which::kFaultyInproc:
        node.transport = CreateInproc(hub_, identity, options);
        break;
      case Which::kUcxShm:
      case Which::kUcxTcp:
      case Which::kFaultyUcx: {
        UcxOptions ucx;
        ucx.transport = options;
        ucx.selection = GetParam() == Which::kUcxTcp ? UcxSelection::kTcp : UcxSelection::kAuto;
        auto made = CreateUcx(identity, ucx);
        EXPECT_TRUE(made.ok()) << made.status();
        node.transport = *std::move(made);
        break;
      }
    }
    if (GetParam() == Which::kFaultyInproc || GetParam() == Which::kFaultyUcx) {
      node.transport = CreateFaulty(std::move(node.transport), {});
    }
    return node;
  }
  Node Make(TransportOptions options = {}) { return Make(MakeIdentity(), options); }

  void ConnectAndWait(Node& a, Node& b) {
    const size_t up_a = a.up.size(), up_b = b.up.size();
    ASSERT_TRUE(a->Connect(b.id(), b->address()).ok());
    ASSERT_TRUE(Pump({&a, &b}, [&] { return a.up.size() > up_a && b.up.size() > up_b; }));
  }

  InprocHub hub_;
};

INSTANTIATE_TEST_SUITE_P(All, TransportTest,
                         ::testing::Values(Which::kInproc, Which::kUcxShm, Which::kUcxTcp,
                                           Which::kFaultyInproc, Which::kFaultyUcx),
                         [](const auto& info) -> std::string {
                           switch (info.param) {
                             case Which::kInproc:
                               return "Inproc";
                             case Which::kUcxShm:
                               return "UcxShm";
                             case Which::kUcxTcp:
                               return "UcxTcp";
                             case Which::kFaultyInproc:
                               return "FaultyInproc";
                             case Which::kFaultyUcx:
                               return "FaultyUcx";
                           }
                           return "";
                         });

// ---- Connecting
// -----------------------------------------------------------------------------------------------

TEST_P(TransportTest, OtherModelPrecisionOrSecretIsRefusedWithTheReason) {
  const Identity good = MakeIdentity();
  Node server = Make(good);
  const auto expect_refused = [&](Identity identity, absl::StatusCode code, const char* text) {
    identity.node_id = RandomNodeId();
    Node client = Make(identity);
    ASSERT_TRUE(client->Connect(server.id(), server->address()).ok());
    ASSERT_TRUE(Pump({&client, &server}, [&] { return !client.lost.empty(); }));
    EXPECT_EQ(client.lost[0].first, server.id());
    EXPECT_EQ(client.lost[0].second.code(), code) << client.lost[0].second;
    EXPECT_THAT(std::string(client.lost[0].second.message()), HasSubstr(text));
    EXPECT_THAT(client.up, IsEmpty());
  };
  Identity other = good;
  other.model_fingerprint = 43;
  expect_refused(other, absl::StatusCode::kFailedPrecondition, "fingerprint");
  other = good;
  other.precision = Precision::kExact;
  expect_refused(other, absl::StatusCode::kFailedPrecondition, "precision");
  other = good;
  other.cluster_secret = "s3creT";
  expect_refused(other, absl::StatusCode::kPermissionDenied, "secret");
  EXPECT_THAT(server.up, IsEmpty());
  EXPECT_THAT(server.lost, IsEmpty());
  // And it still takes a good one.
  Node client = Make();
  ConnectAndWait(client, server);
}

TEST_P(TransportTest, AnotherNodeAtTheAddressIsRefused) {
  if (!over_ucx()) GTEST_SKIP() << "an inproc address is the node";
  Node server = Make();
  Node client = Make();
  const NodeId former = RandomNodeId();
  std::string address = server->address();
  ASSERT_TRUE(client->Connect(former, address).ok());
  ASSERT_TRUE(Pump({&client, &server}, [&] { return !client.lost.empty(); }));
  EXPECT_EQ(client.lost[0].first, former);
  EXPECT_EQ(client.lost[0].second.code(), absl::StatusCode::kFailedPrecondition) << client.lost[0].second;
}

TEST_P(TransportTest, UnreachableAddressIsALostPeer) {
  Node client = Make();
  std::string address;
  NodeId id;
  {
    Node gone = Make();
    address = gone->address();
    id = gone.id();
  }
  ASSERT_TRUE(client->Connect(id, address).ok());
  ASSERT_TRUE(Pump({&client}, [&] { return !client.lost.empty(); }));
  EXPECT_EQ(client.lost[0].second.code(), absl::StatusCode::kUnavailable) << client.lost[0].second;
  ASSERT_THAT(client->all_statistics(), ::testing::SizeIs(1));
  EXPECT_EQ(client->all_statistics()[0].errors, 1u);
  EXPECT_EQ(client->all_statistics()[0].transport, "");
}

TEST_P(TransportTest, MalformedAddressAndOwnIdAreErrors) {
  Node node = Make();
  for (const char* address :
       {"", "nowhere", "inproc:xyz", "host:", ":1", "127.0.0.1:0", "127.0.0.1:70000", "::1:5"}) {
    EXPECT_EQ(node->Connect(RandomNodeId(), address).code(), absl::StatusCode::kInvalidArgument) << address;
  }
  EXPECT_EQ(node->Connect(node.id(), node->address()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(node->Connect(NodeId{}, node->address()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(node.Poll(), 0);
}

TEST_P(TransportTest, PeersBeyondTheLimitAreRefused) {
  Node server = Make(TransportOptions{.peers_max = 1});
  Node first = Make(), second = Make();
  ConnectAndWait(first, server);
  ASSERT_TRUE(second->Connect(server.id(), server->address()).ok());
  ASSERT_TRUE(Pump({&second, &server}, [&] { return !second.lost.empty(); }));
  EXPECT_EQ(second.lost[0].second.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(server->Connect(second.id(), second->address()).code(), absl::StatusCode::kResourceExhausted);
}

TEST_P(TransportTest, BothSidesAreUpOnceAndKnowTheTransport) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  ASSERT_TRUE(a->Connect(b.id(), b->address()).ok());  // does nothing
  ASSERT_TRUE(b->Connect(a.id(), a->address()).ok());
  PumpFor({&a, &b}, absl::Milliseconds(50));
  EXPECT_THAT(a.up, ElementsAre(b.id()));
  EXPECT_THAT(b.up, ElementsAre(a.id()));
  const std::string expected = !over_ucx() ? "inproc" : GetParam() == Which::kUcxTcp ? "tcp" : "posix";
  for (Node* node : {&a, &b}) {
    const auto statistics = (*node)->statistics();
    ASSERT_EQ(statistics.size(), 1u);
    EXPECT_EQ(statistics[0].transport, expected);
    EXPECT_EQ(statistics[0].peer, node == &a ? b.id() : a.id());
    EXPECT_THAT(node->lost, IsEmpty());
  }
}

TEST_P(TransportTest, ConnectingAtOnceEndsInOneConnection) {
  std::mt19937 random(3);
  for (int round = 0; round < (over_ucx() ? 8 : 25); ++round) {
    Node a = Make(), b = Make();
    ASSERT_TRUE(a->Connect(b.id(), b->address()).ok());
    // Every phase of the first one's handshake meets the second.
    for (uint32_t polls = random() % 12; polls > 0; --polls) {
      a.Poll();
      b.Poll();
      if (over_ucx()) absl::SleepFor(absl::Microseconds(random() % 2000));
    }
    ASSERT_TRUE(b->Connect(a.id(), a->address()).ok());
    ASSERT_TRUE(Pump({&a, &b}, [&] { return !a.up.empty() && !b.up.empty(); })) << "round " << round;
    ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 100, TrafficClass::kPrefill, 1)).ok());
    ASSERT_TRUE(b->Send(a.id(), MakeFrame(*b.transport, 100, TrafficClass::kDecode, 2)).ok());
    ASSERT_TRUE(Pump({&a, &b}, [&] { return !a.frames.empty() && !b.frames.empty(); }));
    PumpFor({&a, &b}, absl::Milliseconds(5));
    EXPECT_THAT(a.up, ElementsAre(b.id()));
    EXPECT_THAT(b.up, ElementsAre(a.id()));
    EXPECT_THAT(a.lost, IsEmpty());
    EXPECT_THAT(b.lost, IsEmpty());
  }
}

TEST_P(TransportTest, ManyNodesConnectToOne) {
  Node server = Make();
  std::vector<Node> clients;
  for (int i = 0; i < 6; ++i) clients.push_back(Make());
  for (Node& client : clients) ASSERT_TRUE(client->Connect(server.id(), server->address()).ok());
  for (Node& client : clients) {
    ASSERT_TRUE(Pump({&client, &server}, [&] { return !client.up.empty(); }));
  }
  ASSERT_TRUE(Pump({&server}, [&] { return server.up.size() == 6; }));
  // One frame shared by all sends.
  const FrameRef shared = MakeFrame(*server.transport, 5000, TrafficClass::kDecode, 7);
  for (Node& client : clients) ASSERT_TRUE(server->Send(client.id(), shared).ok());
  for (Node& client : clients) {
    ASSERT_TRUE(Pump({&client, &server}, [&] { return !client.frames.empty(); }));
    ExpectIntact(client.frames[0], server.id());
  }
}

// ---- Frames
// ---------------------------------------------------------------------------------------------------

TEST_P(TransportTest, SendingToAStrangerIsUnavailable) {
  Node node = Make();
  EXPECT_EQ(node->Send(RandomNodeId(), MakeFrame(*node.transport, 10, TrafficClass::kDecode, 1)).code(),
            absl::StatusCode::kUnavailable);
  EXPECT_FALSE(node->TakeCredit(RandomNodeId(), TrafficClass::kDecode, 1));
  node->ReturnCredit(RandomNodeId(), TrafficClass::kDecode, 1);
  node->Disconnect(RandomNodeId());
  EXPECT_EQ(node->frames().frames_in_use(), 0);
}

TEST_P(TransportTest, FramesOfEverySizeArriveIntactInBothClasses) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  uint32_t seed = 0;
  for (uint32_t bytes : {0u, 1u, 63u, 64u, 127u, 1000u, 1024u, 4096u, 8191u, 10240u, 61440u, 65536u, 65537u,
                         81920u, 131072u, 262143u, 262144u}) {
    for (TrafficClass traffic_class : {TrafficClass::kDecode, TrafficClass::kPrefill}) {
      ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, bytes, traffic_class, ++seed)).ok());
      ASSERT_TRUE(Pump({&a, &b}, [&] { return !b.frames.empty(); })) << bytes;
      EXPECT_EQ(b.frames[0].header().payload_bytes, bytes);
      EXPECT_EQ(b.frames[0].header().traffic_class, traffic_class);
      ExpectIntact(b.frames[0], a.id());
      b.frames.clear();
    }
  }
  EXPECT_TRUE(
      Pump({&a, &b}, [&] { return a->frames().frames_in_use() == 0 && b->frames().frames_in_use() == 0; }));
  EXPECT_EQ(a->bad_frames() + b->bad_frames(), 0u);
}

TEST_P(TransportTest, RandomTrafficBothWaysArrivesIntactAndLeavesNoFrameBehind) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  constexpr uint32_t kFrames = 1500;
  std::mt19937 random(5);
  std::map<NodeId, std::vector<bool>> seen;
  int64_t bytes_sent = 0;
  for (Node* node : {&a, &b}) {
    const NodeId other = node == &a ? b.id() : a.id();
    seen[other].resize(kFrames);
    node->on_frame = [&, other](Event& event) {
      ASSERT_EQ(event.peer, other);
      ExpectIntact(event.frame, other);
      ASSERT_LT(event.frame.header().rows, kFrames);
      ASSERT_FALSE(seen[other][event.frame.header().rows]) << "twice";
      seen[other][event.frame.header().rows] = true;
    };
  }
  const auto all_seen = [&] {
    return std::all_of(seen.begin(), seen.end(), [](const auto& entry) {
      return std::all_of(entry.second.begin(), entry.second.end(), [](bool is) { return is; });
    });
  };
  for (uint32_t i = 0; i < kFrames; ++i) {
    for (Node* node : {&a, &b}) {
      const uint32_t bytes = random() % 50 == 0 ? random() % 262145 : random() % 5000;
      const auto traffic_class = static_cast<TrafficClass>(random() % 2);
      bytes_sent += bytes;
      ASSERT_TRUE(
          (*node)
              ->Send(node == &a ? b.id() : a.id(), MakeFrame(*node->transport, bytes, traffic_class, i))
              .ok());
    }
    if (i % 7 == 0) a.Poll();
    if (i % 11 == 0) b.Poll();
  }
  ASSERT_TRUE(Pump({&a, &b}, all_seen));
  EXPECT_TRUE(
      Pump({&a, &b}, [&] { return a->frames().frames_in_use() == 0 && b->frames().frames_in_use() == 0; }));
  const PeerStatistics sa = a->statistics()[0], sb = b->statistics()[0];
  EXPECT_GE(static_cast<int64_t>(sa.sent_bytes + sb.sent_bytes), bytes_sent);
  EXPECT_GE(sa.received_frames, kFrames);
  EXPECT_GE(sb.sent_frames, kFrames);
  EXPECT_THAT(a.lost, IsEmpty());
  EXPECT_THAT(b.lost, IsEmpty());
}

TEST_P(TransportTest, DecodeFramesOvertakePrefillFramesInAPoll) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  std::vector<TrafficClass> order;
  b.on_frame = [&](Event& event) { order.push_back(event.frame.header().traffic_class); };
  for (uint32_t i = 0; i < 20; ++i) {
    const auto traffic_class = i < 10 ? TrafficClass::kPrefill : TrafficClass::kDecode;
    ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 100, traffic_class, i)).ok());
  }
  size_t total = 0;
  ASSERT_TRUE(Pump({&a}, [&] {
    order.clear();
    b.Poll();
    total += order.size();
    EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
    return total == 20;
  }));
}

TEST_P(TransportTest, SenderOfTooMuchIsCutOff) {
  Node a = Make(), b = Make(TransportOptions{.heartbeat = absl::Milliseconds(40), .inbox_frames_max = 10});
  ConnectAndWait(a, b);
  // b does not poll; its keepalive thread fills the inbox.
  for (uint32_t i = 0; i < 60; ++i) {
    if (!a->Send(b.id(), MakeFrame(*a.transport, 10, TrafficClass::kDecode, i)).ok()) break;
  }
  ASSERT_TRUE(Pump({&a}, [&] { return !a.lost.empty(); }));
  ASSERT_TRUE(Pump({&b}, [&] { return !b.lost.empty(); }));
  EXPECT_LE(b.frames.size(), 10u);
}

// ---- Credits
// --------------------------------------------------------------------------------------------------

TEST_P(TransportTest, CreditsRunOutAndComeBack) {
  Node a = Make();
  Node b = Make(TransportOptions{.credit_rows = {100, 7}});
  ConnectAndWait(a, b);
  // Granted by the receiver, per class.
  EXPECT_TRUE(a->TakeCredit(b.id(), TrafficClass::kDecode, 90));
  EXPECT_FALSE(a->TakeCredit(b.id(), TrafficClass::kDecode, 11));
  EXPECT_TRUE(a->TakeCredit(b.id(), TrafficClass::kDecode, 10));
  EXPECT_FALSE(a->TakeCredit(b.id(), TrafficClass::kPrefill, 8));
  EXPECT_TRUE(a->TakeCredit(b.id(), TrafficClass::kPrefill, 7));
  EXPECT_TRUE(b->TakeCredit(a.id(), TrafficClass::kDecode, 4096));
  EXPECT_FALSE(b->TakeCredit(a.id(), TrafficClass::kDecode, 1));

  // A quarter of the grant comes back at once in a Credit frame of its own.
  b->ReturnCredit(a.id(), TrafficClass::kDecode, 25);
  ASSERT_TRUE(Pump({&a, &b}, [&] { return a->TakeCredit(b.id(), TrafficClass::kDecode, 25); }));
  EXPECT_FALSE(a->TakeCredit(b.id(), TrafficClass::kDecode, 1));
  // A little comes back soon all the same.
  b->ReturnCredit(a.id(), TrafficClass::kDecode, 1);
  ASSERT_TRUE(Pump({&a, &b}, [&] { return a->TakeCredit(b.id(), TrafficClass::kDecode, 1); }));
  // Or with the next frame of the class.
  b->ReturnCredit(a.id(), TrafficClass::kPrefill, 1);
  ASSERT_TRUE(b->Send(a.id(), MakeFrame(*b.transport, 10, TrafficClass::kPrefill, 1)).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return !a.frames.empty(); }));
  ASSERT_TRUE(Pump({&a, &b}, [&] { return a->TakeCredit(b.id(), TrafficClass::kPrefill, 1); }));
  // Returning more than was taken does not grow the grant.
  b->ReturnCredit(a.id(), TrafficClass::kPrefill, 1000);
  ASSERT_TRUE(Pump({&a, &b}, [&] { return a->TakeCredit(b.id(), TrafficClass::kPrefill, 7); }));
  EXPECT_FALSE(a->TakeCredit(b.id(), TrafficClass::kPrefill, 1));
  EXPECT_THAT(a.frames, ::testing::SizeIs(1));  // Credit frames are not handed over
}

TEST_P(TransportTest, CreditOfLostMessagesIsForgiven) {
  Node a = Make(TransportOptions{.credit_ttl = absl::Milliseconds(100)});
  Node b = Make(TransportOptions{.credit_rows = {10, 10}});
  ConnectAndWait(a, b);
  const absl::Time begin = absl::Now();
  ASSERT_TRUE(a->TakeCredit(b.id(), TrafficClass::kDecode, 10));
  ASSERT_TRUE(Pump({&a, &b}, [&] { return a->TakeCredit(b.id(), TrafficClass::kDecode, 10); }));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(100));
}

// ---- Leaving
// --------------------------------------------------------------------------------------------------

TEST_P(TransportTest, DisconnectIsAGoodbyeToTheOtherAndSilentHere) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  a->Disconnect(b.id());
  EXPECT_EQ(a->Send(b.id(), MakeFrame(*a.transport, 1, TrafficClass::kDecode, 1)).code(),
            absl::StatusCode::kUnavailable);
  ASSERT_TRUE(Pump({&a, &b}, [&] { return !b.lost.empty(); }));
  EXPECT_EQ(b.lost[0].first, a.id());
  EXPECT_EQ(b.lost[0].second.code(), absl::StatusCode::kCancelled) << b.lost[0].second;
  EXPECT_THAT(a.lost, IsEmpty());
  EXPECT_THAT(a->statistics(), IsEmpty());
  // Totals outlive the connection; a goodbye is no error.
  ASSERT_THAT(b->all_statistics(), ::testing::SizeIs(1));
  EXPECT_EQ(b->all_statistics()[0].peer, a.id());
  EXPECT_EQ(b->all_statistics()[0].errors, 0u);
  EXPECT_NE(b->all_statistics()[0].transport, "");
  const uint64_t received = a->all_statistics()[0].received_frames;
  // And again, from either side.
  for (int round = 0; round < 2; ++round) {
    Node& from = round == 0 ? b : a;
    Node& to = round == 0 ? a : b;
    ConnectAndWait(from, to);
    from->Disconnect(to.id());
    const size_t lost = to.lost.size();
    ASSERT_TRUE(Pump({&a, &b}, [&] { return to.lost.size() > lost; }));
  }
  ASSERT_THAT(a->all_statistics(), ::testing::SizeIs(1));  // one peer, however often it came
  EXPECT_GE(a->all_statistics()[0].received_frames, received);
  EXPECT_EQ(a->all_statistics()[0].errors, 0u);
}

TEST_P(TransportTest, FramesBeforeTheGoodbyeAreStillHandedOver) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  for (uint32_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 2000, TrafficClass::kDecode, i)).ok());
  }
  a->Disconnect(b.id());
  b.on_frame = [&](Event& event) {
    EXPECT_THAT(b.lost, IsEmpty());
    b.frames.push_back(event.frame);
  };
  ASSERT_TRUE(Pump({&a, &b}, [&] { return !b.lost.empty(); }));
  EXPECT_EQ(b.frames.size(), 20u);
}

TEST_P(TransportTest, DestroyedTransportIsAGoodbye) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  std::thread destroyer([&] { a.transport.reset(); });
  ASSERT_TRUE(Pump({&b}, [&] { return !b.lost.empty(); }));
  destroyer.join();
  EXPECT_EQ(b.lost[0].second.code(), absl::StatusCode::kCancelled) << b.lost[0].second;
}

TEST_P(TransportTest, DisconnectInsideAHandlerSilencesThePeer) {
  Node a = Make(), b = Make();
  ConnectAndWait(a, b);
  int frames = 0;
  b.on_frame = [&](Event& event) {
    ++frames;
    b->Disconnect(event.peer);
  };
  for (uint32_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 10, TrafficClass::kDecode, i)).ok());
  }
  ASSERT_TRUE(Pump({&a, &b}, [&] { return !a.lost.empty(); }));
  EXPECT_EQ(frames, 1);
  EXPECT_THAT(b.lost, IsEmpty());
}

TEST_P(TransportTest, FramesMayOutliveTheTransport) {
  FrameRef kept;
  {
    Node a = Make(), b = Make();
    ConnectAndWait(a, b);
    ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 3000, TrafficClass::kDecode, 3)).ok());
    ASSERT_TRUE(Pump({&a, &b}, [&] { return !b.frames.empty(); }));
    ExpectIntact(b.frames[0], a.id());
    kept = b.frames[0];
  }
  std::mt19937 random(3);
  EXPECT_EQ(kept.payload()[0], static_cast<std::byte>(random()));
}

// ---- Time
// -----------------------------------------------------------------------------------------------------

// Two of them are longer than a thread of a busy machine waits for its turn.
constexpr absl::Duration kShortHeartbeat = absl::Milliseconds(150);

TEST_P(TransportTest, AComputingEngineIsNotLost) {
  // Heartbeats without a poll: only the keepalive thread speaks.
  const TransportOptions options{.heartbeat = kShortHeartbeat};
  Node a = Make(options), b = Make(options);
  ConnectAndWait(a, b);
  for (uint32_t i = 0; i < 5; ++i) {
    ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 50000, TrafficClass::kDecode, i)).ok());
  }
  PumpFor({&a}, absl::Seconds(2));
  EXPECT_THAT(a.lost, IsEmpty());
  EXPECT_THAT(b.frames, IsEmpty());
  b.Poll();
  EXPECT_EQ(b.frames.size(), 5u);  // they waited in the inbox
  EXPECT_THAT(b.lost, IsEmpty());
}

TEST_P(TransportTest, BothEnginesComputingAreNotLost) {
  const TransportOptions options{.heartbeat = kShortHeartbeat};
  Node a = Make(options), b = Make(options);
  ConnectAndWait(a, b);
  absl::SleepFor(absl::Seconds(1));
  PumpFor({&a, &b}, absl::Milliseconds(20));
  EXPECT_THAT(a.lost, IsEmpty());
  EXPECT_THAT(b.lost, IsEmpty());
}

TEST_P(TransportTest, WaitingEnginesKeepEachOtherAlive) {
  const TransportOptions options{.poll = PollMode::kBlock, .heartbeat = kShortHeartbeat};
  Node a = Make(options), b = Make(options);
  ConnectAndWait(a, b);
  std::thread other([&] {
    const absl::Time end = absl::Now() + absl::Seconds(1);
    while (absl::Now() < end) {
      b->Wait(end - absl::Now());
      b.Poll();
    }
  });
  const absl::Time end = absl::Now() + absl::Seconds(1);
  while (absl::Now() < end) {
    a->Wait(end - absl::Now());
    a.Poll();
  }
  other.join();
  EXPECT_THAT(a.lost, IsEmpty());
  EXPECT_THAT(b.lost, IsEmpty());
}

TEST_P(TransportTest, WakeEndsTheCurrentAndTheNextWait) {
  for (PollMode mode : {PollMode::kAdaptive, PollMode::kSpin, PollMode::kBlock}) {
    Node node = Make(TransportOptions{.poll = mode});
    const absl::Time begin = absl::Now();
    node->Wake();
    node->Wake();
    node->Wait(absl::Seconds(30));
    std::thread waker([&] {
      absl::SleepFor(absl::Milliseconds(20));
      node->Wake();
    });
    node->Wait(absl::Seconds(30));
    waker.join();
    EXPECT_LT(absl::Now() - begin, absl::Seconds(20));
    // Wakes do not pile up.
    const absl::Time last = absl::Now();
    node->Wait(absl::Milliseconds(30));
    EXPECT_GE(absl::Now() - last, absl::Milliseconds(29));
  }
}

TEST_P(TransportTest, NoArrivalIsSleptThrough) {
  for (PollMode mode : {PollMode::kAdaptive, PollMode::kBlock}) {
    const TransportOptions options{.poll = mode, .spin = absl::Microseconds(5)};
    Node a = Make(options), b = Make(options);
    ConnectAndWait(a, b);
    constexpr uint32_t kRounds = 300;
    std::atomic<bool> slept_through{false};
    // Ping-pong with waits far longer than the test may take: one missed wake-up and it does not end in time.
    const auto run = [&](Node& node, NodeId other, bool first) {
      uint32_t next = 0;
      node.on_frame = [&](Event& event) {
        next = event.frame.header().rows + 1;
        if (next < kRounds) {
          EXPECT_TRUE(
              node->Send(other, MakeFrame(*node.transport, next * 37 % 3000, TrafficClass::kDecode, next))
                  .ok());
        }
      };
      if (first) {
        EXPECT_TRUE(node->Send(other, MakeFrame(*node.transport, 0, TrafficClass::kDecode, 0)).ok());
      }
      while (next + 1 < kRounds && !slept_through) {
        const absl::Time begin = absl::Now();
        node->Wait(absl::Seconds(10));
        if (absl::Now() - begin > absl::Seconds(9)) slept_through = true;
        node.Poll();
      }
      node.on_frame = nullptr;
    };
    std::thread other([&] { run(b, a.id(), false); });
    run(a, b.id(), true);
    other.join();
    EXPECT_FALSE(slept_through);
  }
}

// ---- Faults
// ---------------------------------------------------------------------------------------------------

struct Fates {
  FaultCounts counts;
  std::vector<uint32_t> order;  // as they arrived
};

Fates RunFaulty(FaultOptions options, uint32_t frames) {
  InprocHub hub;
  const auto identity = [] { return Identity{.node_id = RandomNodeId()}; };
  Node a, b;
  auto faulty = CreateFaulty(CreateInproc(hub, identity()), options);
  FaultyTransport* const handle = faulty.get();
  a.transport = std::move(faulty);
  b.transport = CreateInproc(hub, identity());
  EXPECT_TRUE(a->Connect(b.id(), b->address()).ok());
  EXPECT_TRUE(Pump({&a, &b}, [&] { return !a.up.empty() && !b.up.empty(); }));
  Fates fates;
  b.on_frame = [&](Event& event) {
    ExpectIntact(event.frame, a.id());
    fates.order.push_back(event.frame.header().rows);
  };
  for (uint32_t i = 0; i < frames; ++i) {
    EXPECT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, i % 200, TrafficClass::kDecode, i)).ok());
    if (i % 100 == 0) b.Poll();
  }
  const auto expected = [&] { return frames - handle->counts().dropped + handle->counts().duplicated; };
  EXPECT_TRUE(Pump({&a, &b}, [&] { return fates.order.size() >= expected(); }));
  PumpFor({&a, &b}, absl::Milliseconds(5));
  fates.counts = handle->counts();
  EXPECT_EQ(fates.order.size(), expected());
  EXPECT_EQ(fates.counts.frames, frames);
  EXPECT_TRUE(Pump({&a, &b}, [&] { return a->frames().frames_in_use() == 0; }));
  return fates;
}

TEST(Faulty, DropsAndRepeatsAsOftenAsAskedAndTheSameBySeed) {
  const FaultOptions options{.seed = 7, .drop_probability = 0.1, .duplicate_probability = 0.05};
  const Fates first = RunFaulty(options, 10000);
  EXPECT_NEAR(static_cast<double>(first.counts.dropped), 1000, 150);
  EXPECT_NEAR(static_cast<double>(first.counts.duplicated), 450, 100);
  EXPECT_TRUE(std::is_sorted(first.order.begin(), first.order.end()));
  EXPECT_EQ(RunFaulty(options, 10000).order, first.order);
  FaultOptions other = options;
  other.seed = 8;
  EXPECT_NE(RunFaulty(other, 10000).order, first.order);
}

TEST(Faulty, ReordersWithinTheSpanAndTheSameBySeed) {
  const FaultOptions options{
      .seed = 9, .delay_max = absl::Seconds(1), .reorder_probability = 0.2, .reorder_span_max = 5};
  const Fates first = RunFaulty(options, 5000);
  EXPECT_NEAR(static_cast<double>(first.counts.reordered), 1000, 150);
  EXPECT_FALSE(std::is_sorted(first.order.begin(), first.order.end()));
  for (size_t i = 0; i < first.order.size(); ++i) {
    EXPECT_LE(std::abs(static_cast<int64_t>(first.order[i]) - static_cast<int64_t>(i)), 16);
  }
  EXPECT_EQ(RunFaulty(options, 5000).order, first.order);
}

TEST(Faulty, DelayedFramesArriveLaterButDoArrive) {
  const Fates fates =
      RunFaulty({.seed = 3, .delay_probability = 0.3, .delay_max = absl::Milliseconds(30)}, 2000);
  EXPECT_NEAR(static_cast<double>(fates.counts.delayed), 600, 120);
  EXPECT_FALSE(std::is_sorted(fates.order.begin(), fates.order.end()));
}

TEST(Faulty, OnlyTheNamedKindsAreAffected) {
  FaultOptions options{.drop_probability = 1};
  options.kinds = uint64_t{1} << static_cast<int>(wire::Kind::kDispatch);
  InprocHub hub;
  Node a, b;
  a.transport = CreateFaulty(CreateInproc(hub, Identity{.node_id = NodeId{1}}), options);
  b.transport = CreateInproc(hub, Identity{.node_id = NodeId{2}});
  ASSERT_TRUE(a->Connect(b.id(), b->address()).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return !a.up.empty() && !b.up.empty(); }));
  FrameRef dispatch = a->frames().Allocate(0);
  dispatch.header().kind = wire::Kind::kDispatch;
  ASSERT_TRUE(a->Send(b.id(), dispatch).ok());
  ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 1, TrafficClass::kDecode, 1)).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return !b.frames.empty(); }));
  EXPECT_EQ(b.frames[0].header().kind, wire::Kind::kPartial);
}

TEST(Faulty, CreditOfDroppedFramesComesBackByItsTimeToLive) {
  InprocHub hub;
  Node a, b;
  a.transport = CreateFaulty(CreateInproc(hub, Identity{.node_id = NodeId{1}},
                                          TransportOptions{.credit_ttl = absl::Milliseconds(50)}),
                             {.drop_probability = 1});
  b.transport = CreateInproc(hub, Identity{.node_id = NodeId{2}}, TransportOptions{.credit_rows = {4, 4}});
  ASSERT_TRUE(a->Connect(b.id(), b->address()).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return !a.up.empty() && !b.up.empty(); }));
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(Pump({&a, &b}, [&] { return a->TakeCredit(b.id(), TrafficClass::kDecode, 4); }));
    ASSERT_TRUE(a->Send(b.id(), MakeFrame(*a.transport, 1, TrafficClass::kDecode, 1)).ok());
    EXPECT_FALSE(a->TakeCredit(b.id(), TrafficClass::kDecode, 1));
  }
  EXPECT_THAT(b.frames, IsEmpty());
}

// ---- Rows in row memory
// ---------------------------------------------------------------------------------------

constexpr int64_t kRowBytes = 1024;
constexpr int32_t kBlockRows = 256;

// A message of rows, these in the transport's row memory.
FrameRef MakeRows(Transport& transport, wire::Kind kind, uint32_t rows, uint32_t seed = 1) {
  RowMemory& memory = *transport.row_memory();
  wire::FrameHeader header;
  header.kind = kind;
  header.rows = rows;
  header.pairs = kind == wire::Kind::kExpertWork ? 2 * rows : 0;
  header.step = seed;
  header.payload_bytes = wire::kPayloadBytesMax;
  const uint32_t offset = *wire::RowDataOffsetOf(header);
  const auto bytes = static_cast<uint32_t>(rows * memory.row_bytes());
  FrameRef frame = transport.frames().AllocateWithRows(offset + bytes, offset, memory);
  EXPECT_TRUE(frame);
  header.payload_bytes = offset + bytes;
  frame.header() = header;
  std::mt19937 random(seed);
  for (uint32_t i = 0; i < offset; ++i) frame.payload()[i] = static_cast<std::byte>(random());
  for (uint32_t i = 0; i < bytes; ++i) frame.device_rows()[i] = static_cast<std::byte>(random());
  return frame;
}

void ExpectRowsIntact(const FrameRef& frame) {
  const wire::FrameHeader& header = frame.header();
  const uint32_t offset = *wire::RowDataOffsetOf(header);
  if (frame.device_rows() != nullptr) {
    EXPECT_EQ(frame.rows_offset(), offset);
  }
  const std::byte* rows = frame.device_rows() == nullptr ? frame.payload() + offset : frame.device_rows();
  std::mt19937 random(static_cast<uint32_t>(header.step));
  for (uint32_t i = 0; i < offset; ++i)
    ASSERT_EQ(frame.payload()[i], static_cast<std::byte>(random())) << "byte " << i << " of descriptors";
  for (uint32_t i = 0; i < header.payload_bytes - offset; ++i)
    ASSERT_EQ(rows[i], static_cast<std::byte>(random())) << "byte " << i << " of " << header.rows << " rows";
}

constexpr wire::Kind kRowKinds[] = {wire::Kind::kDispatch, wire::Kind::kExpertWork, wire::Kind::kPartial};

TEST_P(TransportTest, RowsGoFromRowMemoryToRowMemory) {
  HostRowMemory memory_a(kRowBytes, kBlockRows, 8), memory_b(kRowBytes, kBlockRows, 8);
  Node a = Make(TransportOptions{.rows = &memory_a}), b = Make(TransportOptions{.rows = &memory_b});
  ASSERT_EQ(a->row_memory(), &memory_a);
  ConnectAndWait(a, b);
  uint32_t seed = 0;
  for (const wire::Kind kind : kRowKinds) {
    // 250: with the descriptors of all kinds nearly the longest payload.
    for (const uint32_t rows : {1u, 2u, 7u, 8u, 9u, 59u, 60u, 61u, 128u, 250u}) {
      ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, kind, rows, ++seed)).ok());
      ASSERT_TRUE(Pump({&a, &b}, [&] { return !b.frames.empty(); })) << ToString(kind) << " rows " << rows;
      const FrameRef frame = std::move(b.frames[0]);
      b.frames.clear();
      EXPECT_EQ(frame.header().kind, kind);
      EXPECT_EQ(frame.header().rows, rows);
      ASSERT_NE(frame.device_rows(), nullptr) << ToString(kind) << " rows " << rows;
      EXPECT_EQ(frame.row_memory(), &memory_b);
      EXPECT_EQ(memory_b.RowNumber(frame.device_rows()) % kBlockRows, 0);
      ExpectRowsIntact(frame);
    }
  }
  ASSERT_TRUE(Pump({&a, &b}, [&] { return memory_a.blocks_free() == 8 && memory_b.blocks_free() == 8; }));
  EXPECT_EQ(b->statistics()[0].frames_in_row_memory, seed);
  EXPECT_EQ(b->statistics()[0].frames_in_host_memory, 0u);
}

TEST_P(TransportTest, RowsReachAPeerWithoutRowMemoryInHostMemory) {
  HostRowMemory memory(kRowBytes, kBlockRows, 4);
  Node a = Make(TransportOptions{.rows = &memory}), b = Make();
  EXPECT_EQ(b->row_memory(), nullptr);
  ConnectAndWait(a, b);
  uint32_t seed = 0;
  for (const wire::Kind kind : kRowKinds) {
    for (const uint32_t rows : {1u, 60u, 250u}) {
      ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, kind, rows, ++seed)).ok());
      ASSERT_TRUE(Pump({&a, &b}, [&] { return b.frames.size() == seed && memory.blocks_free() == 4; }));
      EXPECT_EQ(b.frames.back().device_rows(), nullptr);
      ExpectRowsIntact(b.frames.back());
    }
  }
  EXPECT_EQ(b->statistics()[0].frames_in_host_memory, seed);
  EXPECT_EQ(b->statistics()[0].frames_in_row_memory, 0u);
}

TEST_P(TransportTest, HostRowsReachAPeerWithRowMemory) {
  HostRowMemory memory(kRowBytes, kBlockRows, 4);
  Node a = Make(), b = Make(TransportOptions{.rows = &memory});
  ConnectAndWait(a, b);
  for (uint32_t rows : {1u, 60u, 250u}) {
    FrameRef frame = a->frames().Allocate(static_cast<uint32_t>(rows * kRowBytes));
    frame.header().kind = wire::Kind::kDispatch;
    frame.header().rows = rows;
    frame.header().step = rows;
    std::mt19937 random(rows);
    for (std::byte& byte : frame.payload_span()) byte = static_cast<std::byte>(random());
    ASSERT_TRUE(a->Send(b.id(), std::move(frame)).ok());
  }
  ASSERT_TRUE(Pump({&a, &b}, [&] { return b.frames.size() == 3; }));
  for (const FrameRef& frame : b.frames) ExpectRowsIntact(frame);
  const PeerStatistics statistics = b->statistics()[0];
  EXPECT_EQ(statistics.frames_in_host_memory + statistics.frames_in_row_memory, 3u);
}

TEST_P(TransportTest, WithoutAFreeBlockRowsComeToHostMemory) {
  HostRowMemory memory_a(kRowBytes, kBlockRows, 8), memory_b(kRowBytes, kBlockRows, 2);
  Node a = Make(TransportOptions{.rows = &memory_a}), b = Make(TransportOptions{.rows = &memory_b});
  ConnectAndWait(a, b);
  for (uint32_t i = 1; i <= 5; ++i)
    ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, wire::Kind::kPartial, 40 * i, i)).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return b.frames.size() == 5; }));
  EXPECT_EQ(std::count_if(b.frames.begin(), b.frames.end(),
                          [](const FrameRef& frame) { return frame.device_rows() != nullptr; }),
            2);
  for (const FrameRef& frame : b.frames) ExpectRowsIntact(frame);
  EXPECT_EQ(b->statistics()[0].frames_in_row_memory, 2u);
  EXPECT_EQ(b->statistics()[0].frames_in_host_memory, 3u);
  b.frames.clear();
  EXPECT_EQ(memory_b.blocks_free(), 2);
  ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, wire::Kind::kPartial, 3, 9)).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return b.frames.size() == 1; }));
  EXPECT_NE(b.frames[0].device_rows(), nullptr);
}

TEST_P(TransportTest, RowsOfAnotherLengthDoNotLieBetweenOurs) {
  HostRowMemory memory_a(kRowBytes, 8, 4), memory_b(2 * kRowBytes, 8, 4);
  Node a = Make(TransportOptions{.rows = &memory_a}), b = Make(TransportOptions{.rows = &memory_b});
  ConnectAndWait(a, b);
  ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, wire::Kind::kPartial, 8)).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return b.frames.size() == 1; }));
  EXPECT_EQ(b.frames[0].device_rows(), nullptr);
  ExpectRowsIntact(b.frames[0]);
}

TEST_P(TransportTest, APeerOfWireVersion1GetsItsRowsWithTheDescriptors) {
  HostRowMemory memory_a(kRowBytes, kBlockRows, 4), memory_b(kRowBytes, kBlockRows, 4);
  Node a = Make(TransportOptions{.rows = &memory_a});
  Node b = Make(TransportOptions{.rows = &memory_b, .wire_version = 1});
  ConnectAndWait(a, b);
  for (Node* from : {&a, &b}) {
    Node& to = from == &a ? b : a;
    for (const wire::Kind kind : {wire::Kind::kExpertWork, wire::Kind::kPartial}) {
      ASSERT_TRUE((*from)->Send(to.id(), MakeRows(*from->transport, kind, 100)).ok());
      ASSERT_TRUE(Pump({&a, &b}, [&] { return !to.frames.empty(); }));
      EXPECT_EQ(to.frames[0].device_rows(), nullptr);
      if (over_ucx()) {
        EXPECT_EQ(to.frames[0].header().version, 1);
      }
      ExpectRowsIntact(to.frames[0]);
      to.frames.clear();
    }
  }
  EXPECT_TRUE(Pump({&a, &b}, [&] { return memory_a.blocks_free() == 4 && memory_b.blocks_free() == 4; }));
  EXPECT_THAT(a.lost, IsEmpty());
}

TEST_P(TransportTest, DescriptorsTooLongForTheWireBelowTakeTheirRowsAlong) {
  HostRowMemory memory_a(16, 4000, 2), memory_b(16, 4000, 2);
  Node a = Make(TransportOptions{.rows = &memory_a}), b = Make(TransportOptions{.rows = &memory_b});
  ConnectAndWait(a, b);
  // 96,000 bytes of descriptors: no transport of UCX has room for them in a header.
  ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, wire::Kind::kExpertWork, 4000)).ok());
  ASSERT_TRUE(Pump({&a, &b}, [&] { return b.frames.size() == 1 && memory_a.blocks_free() == 2; }));
  EXPECT_EQ(b.frames[0].device_rows() == nullptr, over_ucx());
  ExpectRowsIntact(b.frames[0]);
}

TEST_P(TransportTest, OneFrameOfRowsMayGoToSeveralPeers) {
  HostRowMemory memory_a(kRowBytes, kBlockRows, 1), memory_b(kRowBytes, kBlockRows, 1);
  Node a = Make(TransportOptions{.rows = &memory_a}), b = Make(TransportOptions{.rows = &memory_b});
  Node c = Make(), old = Make(TransportOptions{.wire_version = 1});
  for (Node* peer : {&b, &c, &old}) ConnectAndWait(a, *peer);
  FrameRef frame = MakeRows(*a.transport, wire::Kind::kExpertWork, 100);
  for (Node* peer : {&b, &c, &old}) ASSERT_TRUE(a->Send(peer->id(), frame).ok());
  frame = FrameRef();
  ASSERT_TRUE(Pump({&a, &b, &c, &old}, [&] {
    return b.frames.size() == 1 && c.frames.size() == 1 && old.frames.size() == 1 &&
           memory_a.blocks_free() == 1;
  }));
  for (Node* peer : {&b, &c, &old}) ExpectRowsIntact(peer->frames[0]);
  EXPECT_NE(b.frames[0].device_rows(), nullptr);
}

TEST_P(TransportTest, AReceivedFrameOfRowsCanBeSentOn) {
  HostRowMemory memory_a(kRowBytes, kBlockRows, 1), memory_b(kRowBytes, kBlockRows, 1);
  Node a = Make(TransportOptions{.rows = &memory_a}), b = Make(TransportOptions{.rows = &memory_b});
  ConnectAndWait(a, b);
  ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, wire::Kind::kPartial, 100)).ok());
  b.on_frame = [&](Event& event) { ASSERT_TRUE(b->Send(event.peer, std::move(event.frame)).ok()); };
  ASSERT_TRUE(Pump({&a, &b}, [&] { return a.frames.size() == 1; }));
  ExpectRowsIntact(a.frames[0]);
  a.frames.clear();
  EXPECT_TRUE(Pump({&a, &b}, [&] { return memory_a.blocks_free() == 1 && memory_b.blocks_free() == 1; }));
}

TEST_P(TransportTest, ALostPeerLeavesNoBlockBehind) {
  HostRowMemory memory_a(kRowBytes, kBlockRows, 16), memory_b(kRowBytes, kBlockRows, 16);
  Node a = Make(TransportOptions{.rows = &memory_a});
  {
    Node b = Make(TransportOptions{.rows = &memory_b});
    ConnectAndWait(a, b);
    for (uint32_t i = 0; i < 16; ++i)
      ASSERT_TRUE(a->Send(b.id(), MakeRows(*a.transport, wire::Kind::kPartial, 200, i)).ok());
    b.transport.reset();
  }
  EXPECT_TRUE(Pump({&a}, [&] { return !a.lost.empty(); }));
  EXPECT_TRUE(Pump({&a}, [&] { return memory_a.blocks_free() == 16; }));
  EXPECT_EQ(memory_b.blocks_free(), 16);
}

// A GPU that fails.
class BrokenRowMemory final : public RowMemory {
 public:
  BrokenRowMemory() : RowMemory(memory_, 64, 4, 1) {}
  bool on_gpu() const override { return false; }
  absl::Status CopyToHost(std::byte*, const std::byte*, size_t) override {
    return absl::InternalError("broken");
  }
  absl::Status CopyRows(std::span<const RowCopy>) override { return absl::InternalError("broken"); }

 private:
  alignas(64) std::byte memory_[256] = {};
};

TEST_P(TransportTest, RowsThatCannotBeReadAreNotSent) {
  BrokenRowMemory memory;
  Node a = Make(TransportOptions{.rows = &memory}), old = Make(TransportOptions{.wire_version = 1});
  ConnectAndWait(a, old);
  EXPECT_EQ(a->Send(old.id(), MakeRows(*a.transport, wire::Kind::kPartial, 4)).code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(memory.blocks_free(), 1);
  PumpFor({&a, &old}, absl::Milliseconds(20));
  EXPECT_THAT(old.frames, IsEmpty());
  EXPECT_THAT(a.lost, IsEmpty());
}

}  // namespace
}  // namespace minke::transport
