#include "libs/transport/handshake.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

namespace minke::transport::internal {
namespace {

using Side = Handshake::Side;
using ::testing::HasSubstr;

Identity MakeIdentity(uint64_t id) {
  return {.node_id = NodeId{id}, .role = 3, .model_fingerprint = 77, .cluster_secret = "secret"};
}

struct Pair {
  Handshake initiator, responder;
  absl::Status initiator_status, responder_status;

  Pair(const Identity& a, const Identity& b, Versions va = {}, Versions vb = {}, NodeId expected = {})
      : initiator(Side::kInitiator, a, {}, wire::TrafficClass::kDecode, expected.value ? expected : b.node_id,
                  va),
        responder(Side::kResponder, b, {}, wire::TrafficClass::kDecode, {}, vb) {}

  // Carries messages to and fro; `tamper(i, message)` may change the i-th.
  template <typename Tamper>
  void Run(Tamper tamper) {
    std::optional<Handshake::Message> message = initiator.Start();
    bool to_responder = true;
    for (int i = 0; message.has_value() && i < 10; ++i) {
      tamper(i, *message);
      Handshake& receiver = to_responder ? responder : initiator;
      Handshake::Step step = receiver.Receive(message->kind, message->payload);
      (to_responder ? responder_status : initiator_status).Update(step.status);
      message = std::move(step.answer);
      if (receiver.must_decide()) message = receiver.Accept();
      to_responder = !to_responder;
    }
  }
  void Run() {
    Run([](int, Handshake::Message&) {});
  }
  bool done() const { return initiator.done() && responder.done(); }
};

TEST(Handshake, EndsWithBothSidesKnowingEachOther) {
  Pair pair(MakeIdentity(1), MakeIdentity(2));
  pair.Run();
  ASSERT_TRUE(pair.done());
  EXPECT_EQ(pair.initiator.peer_hello().node_id, 2u);
  EXPECT_EQ(pair.responder.peer_hello().node_id, 1u);
  EXPECT_EQ(pair.responder.peer_hello().role, 3);
  EXPECT_EQ(pair.responder.peer_hello().credit_rows[1], 4096u);
  EXPECT_EQ(pair.initiator.version(), wire::kVersion);
}

TEST(Handshake, EmptySecretIsASecretToo) {
  Identity a = MakeIdentity(1), b = MakeIdentity(2);
  a.cluster_secret = b.cluster_secret = "";
  Pair pair(a, b);
  pair.Run();
  EXPECT_TRUE(pair.done());
  b.cluster_secret = "x";
  Pair unequal(a, b);
  unequal.Run();
  EXPECT_FALSE(unequal.initiator.done() || unequal.responder.done());
  EXPECT_EQ(unequal.initiator_status.code(), absl::StatusCode::kPermissionDenied);
}

void ExpectRefused(Pair& pair, absl::StatusCode code, const char* text) {
  pair.Run();
  EXPECT_FALSE(pair.initiator.done());
  EXPECT_FALSE(pair.responder.done());
  EXPECT_EQ(pair.initiator_status.code(), code) << pair.initiator_status;
  EXPECT_EQ(pair.responder_status.code(), code) << pair.responder_status;
  EXPECT_THAT(std::string(pair.initiator_status.message()), HasSubstr(text));
}

TEST(Handshake, OtherFingerprintPrecisionSecretOrNodeIsRefusedOnBothSides) {
  Identity other = MakeIdentity(2);
  other.model_fingerprint = 78;
  Pair fingerprint(MakeIdentity(1), other);
  ExpectRefused(fingerprint, absl::StatusCode::kFailedPrecondition, "fingerprint");
  other = MakeIdentity(2);
  other.precision = Precision::kExact;
  Pair precision(MakeIdentity(1), other);
  ExpectRefused(precision, absl::StatusCode::kFailedPrecondition, "exact");
  other = MakeIdentity(2);
  other.cluster_secret = "secreT";
  Pair secret(MakeIdentity(1), other);
  ExpectRefused(secret, absl::StatusCode::kPermissionDenied, "secret");
  Pair node(MakeIdentity(1), MakeIdentity(2), {}, {}, NodeId{3});
  ExpectRefused(node, absl::StatusCode::kFailedPrecondition, "node");
}

TEST(Handshake, NeighbouringVersionsAgreeOnTheOlder) {
  Pair pair(MakeIdentity(1), MakeIdentity(2), Versions{1, 2}, Versions{2, 3});
  pair.Run();
  ASSERT_TRUE(pair.done());
  EXPECT_EQ(pair.initiator.version(), 2);
  EXPECT_EQ(pair.responder.version(), 2);
}

TEST(Handshake, VersionsTwoApartAreRefused) {
  Pair newer(MakeIdentity(1), MakeIdentity(2), Versions{1, 2}, Versions{3, 4});
  ExpectRefused(newer, absl::StatusCode::kFailedPrecondition, "wire version");
  Pair older(MakeIdentity(1), MakeIdentity(2), Versions{3, 4}, Versions{1, 2});
  ExpectRefused(older, absl::StatusCode::kFailedPrecondition, "wire version");
}

TEST(Handshake, AnyFlippedBitOfHelloOrAuthIsRefused) {
  std::mt19937 random(1);
  for (int message_index = 0; message_index < 4; ++message_index) {
    const size_t bytes = message_index < 2 ? sizeof(HelloPayload) : sizeof(Mac);
    for (size_t byte = 0; byte < bytes; ++byte) {
      Pair pair(MakeIdentity(1), MakeIdentity(2));
      pair.Run([&](int i, Handshake::Message& message) {
        if (i != message_index) return;
        ASSERT_EQ(message.payload.size(), bytes);
        message.payload[byte] ^= static_cast<std::byte>(1u << random() % 8);
      });
      EXPECT_FALSE(pair.initiator.done() || pair.responder.done()) << message_index << " " << byte;
    }
  }
}

TEST(Handshake, WrongLengthsAndOrderAreRefused) {
  for (int message_index = 0; message_index < 6; ++message_index) {
    for (int change : {-1, 1}) {
      Pair pair(MakeIdentity(1), MakeIdentity(2));
      pair.Run([&](int i, Handshake::Message& message) {
        if (i == message_index) message.payload.resize(message.payload.size() + change);
      });
      EXPECT_FALSE(pair.done()) << message_index;
    }
    for (wire::Kind kind :
         {wire::Kind::kHello, wire::Kind::kAuth, wire::Kind::kAck, wire::Kind::kHeartbeat}) {
      Pair pair(MakeIdentity(1), MakeIdentity(2));
      bool changed = false;
      pair.Run([&](int i, Handshake::Message& message) {
        if (i == message_index && message.kind != kind) message.kind = kind, changed = true;
      });
      EXPECT_NE(pair.done(), changed) << message_index;
    }
  }
}

// Without the prover's byte in the text, the initiator could be shown its own proof.
TEST(Handshake, AnAuthSentBackIsRefused) {
  Identity thief = MakeIdentity(2);
  thief.cluster_secret = "guess";
  Pair pair(MakeIdentity(1), thief);
  std::vector<std::byte> initiators_auth;
  pair.Run([&](int i, Handshake::Message& message) {
    if (i == 2) initiators_auth = message.payload;
    if (i == 3) message = {wire::Kind::kAuth, initiators_auth};
  });
  EXPECT_FALSE(pair.initiator.done());
}

TEST(Handshake, ReplayedInitiatorIsRefusedByTheFreshNonce) {
  std::vector<Handshake::Message> recorded;
  Pair first(MakeIdentity(1), MakeIdentity(2));
  first.Run([&](int i, Handshake::Message& message) {
    if (i % 2 == 0) recorded.push_back(message);
  });
  ASSERT_TRUE(first.done());
  Handshake victim(Side::kResponder, MakeIdentity(2), {}, wire::TrafficClass::kDecode);
  ASSERT_TRUE(victim.Receive(recorded[0].kind, recorded[0].payload).status.ok());
  victim.Accept();
  EXPECT_EQ(victim.Receive(recorded[1].kind, recorded[1].payload).status.code(),
            absl::StatusCode::kPermissionDenied);
}

TEST(Handshake, RefusalTextIsBoundedAndPrintable) {
  Handshake responder(Side::kResponder, MakeIdentity(2), {}, wire::TrafficClass::kDecode);
  const Handshake::Message ack =
      responder.Refuse(absl::InternalError("line\nbreak " + std::string(2 * kAckTextBytesMax, 'x')));
  EXPECT_EQ(ack.payload.size(), sizeof(AckPayload) + kAckTextBytesMax);
  Handshake initiator(Side::kInitiator, MakeIdentity(1), {}, wire::TrafficClass::kDecode, NodeId{2});
  initiator.Start();
  const Handshake::Step step = initiator.Receive(ack.kind, ack.payload);
  EXPECT_EQ(step.status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(step.status.message()), HasSubstr("line break xxx"));
  EXPECT_TRUE(initiator.refused_by_peer());
}

}  // namespace
}  // namespace minke::transport::internal
