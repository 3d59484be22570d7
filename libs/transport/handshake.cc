#include "libs/transport/handshake.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/strings/str_format.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::transport::internal {
namespace {

// A peer that announced longer periods could be frozen for longer than anyone should wait.
constexpr uint32_t kHeartbeatMsMax = 60'000;

template <typename T>
std::vector<std::byte> Bytes(const T& value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  return {begin, begin + sizeof(T)};
}

Handshake::Message AckMessage(const absl::Status& status) {
  const auto text = status.message().substr(0, kAckTextBytesMax);
  const AckPayload ack{static_cast<uint32_t>(status.code()), static_cast<uint32_t>(text.size())};
  Handshake::Message message{wire::Kind::kAck, std::vector<std::byte>(sizeof(ack) + text.size())};
  std::memcpy(message.payload.data(), &ack, sizeof(ack));
  std::copy(text.begin(), text.end(), reinterpret_cast<char*>(message.payload.data() + sizeof(ack)));
  return message;
}

std::string PrecisionName(uint8_t precision) {
  return precision <= static_cast<uint8_t>(Precision::kBF16)
             ? std::string(ToString(static_cast<Precision>(precision)))
             : StrCat("number ", int{precision});
}

}  // namespace

Handshake::Handshake(Side side, const Identity& self, const TransportOptions& options,
                     wire::TrafficClass traffic_class, NodeId expected_peer, Versions versions)
    : side_(side),
      secret_(self.cluster_secret),
      expected_peer_(expected_peer),
      versions_(versions),
      traffic_class_(traffic_class) {
  own_hello_.node_id = self.node_id.value;
  own_hello_.expected_peer = expected_peer.value;
  own_hello_.model_fingerprint = self.model_fingerprint;
  MK_CHECK(RAND_bytes(own_hello_.nonce, sizeof(own_hello_.nonce)) == 1);
  std::copy(std::begin(options.credit_rows), std::end(options.credit_rows), own_hello_.credit_rows);
  own_hello_.heartbeat_ms = static_cast<uint32_t>(
      std::clamp<int64_t>(absl::ToInt64Milliseconds(options.heartbeat), 1, kHeartbeatMsMax));
  own_hello_.version_oldest = versions.oldest;
  own_hello_.version_newest = versions.newest;
  own_hello_.role = self.role;
  own_hello_.precision = static_cast<uint8_t>(self.precision);
  own_hello_.takes_rows = options.rows != nullptr ? 1 : 0;
  if (side == Side::kResponder) state_ = State::kExpectHello;
}

Handshake::Message Handshake::Start() {
  MK_CHECK(side_ == Side::kInitiator && state_ == State::kStart);
  state_ = State::kExpectHello;
  return {wire::Kind::kHello, Bytes(own_hello_)};
}

Handshake::Step Handshake::Receive(wire::Kind kind, std::span<const std::byte> payload) {
  if (kind == wire::Kind::kAck && state_ != State::kDone && state_ != State::kFailed) {
    if (absl::Status status = ReadAck(payload); !status.ok()) return Fail(status, /*tell_peer=*/false);
    if (state_ == State::kExpectAck) {
      state_ = State::kDone;
      if (side_ == Side::kResponder) return {AckMessage(absl::OkStatus()), absl::OkStatus()};
      return {};
    }
  } else if (kind == wire::Kind::kHello && state_ == State::kExpectHello) {
    if (absl::Status status = ReadHello(payload); !status.ok()) return Fail(status, /*tell_peer=*/true);
    if (side_ == Side::kResponder) {
      state_ = State::kDecide;
      return {};
    }
    state_ = State::kExpectAuth;
    return {AuthMessage(), absl::OkStatus()};
  } else if (kind == wire::Kind::kAuth && state_ == State::kExpectAuth) {
    if (absl::Status status = CheckAuth(payload); !status.ok()) return Fail(status, /*tell_peer=*/true);
    state_ = State::kExpectAck;
    if (side_ == Side::kResponder) return {AuthMessage(), absl::OkStatus()};
    return {AckMessage(absl::OkStatus()), absl::OkStatus()};
  }
  return Fail(absl::InvalidArgumentError(StrCat("handshake: ", ToString(kind), " out of turn")),
              /*tell_peer=*/false);
}

Handshake::Message Handshake::Accept() {
  MK_CHECK(must_decide());
  own_hello_.expected_peer = peer_hello_.node_id;
  state_ = State::kExpectAuth;
  return {wire::Kind::kHello, Bytes(own_hello_)};
}

Handshake::Message Handshake::Refuse(const absl::Status& status) {
  state_ = State::kFailed;
  return AckMessage(status);
}

Handshake::Step Handshake::Fail(absl::Status status, bool tell_peer) {
  state_ = State::kFailed;
  Step step;
  if (tell_peer) step.answer = AckMessage(status);
  step.status = std::move(status);
  return step;
}

absl::Status Handshake::ReadHello(std::span<const std::byte> payload) {
  if (payload.size() != sizeof(HelloPayload)) {
    return absl::InvalidArgumentError(
        StrCat("Hello: expected ", sizeof(HelloPayload), " bytes, found ", payload.size()));
  }
  std::memcpy(&peer_hello_, payload.data(), sizeof(HelloPayload));
  // Messages are read by the other side too: "this node" is always the one that checks.
  version_ = std::min(versions_.newest, peer_hello_.version_newest);
  if (version_ < std::max(versions_.oldest, peer_hello_.version_oldest)) {
    return absl::FailedPreconditionError(
        StrCat("wire version: this node speaks ", int{versions_.oldest}, "..", int{versions_.newest},
               ", the other ", int{peer_hello_.version_oldest}, "..", int{peer_hello_.version_newest}));
  }
  if (peer_hello_.node_id == 0 || peer_hello_.heartbeat_ms == 0 ||
      peer_hello_.heartbeat_ms > kHeartbeatMsMax) {
    return absl::InvalidArgumentError(StrCat("Hello: node id ", ToString(NodeId{peer_hello_.node_id}),
                                             " or heartbeat ", peer_hello_.heartbeat_ms, " ms out of range"));
  }
  if (side_ == Side::kInitiator && peer_hello_.node_id != expected_peer_.value) {
    return absl::FailedPreconditionError(StrCat("node: expected ", ToString(expected_peer_), ", found ",
                                                ToString(NodeId{peer_hello_.node_id}), " at this address"));
  }
  if (peer_hello_.expected_peer != own_hello_.node_id) {
    return absl::FailedPreconditionError(StrCat("node: the other expected ",
                                                ToString(NodeId{peer_hello_.expected_peer}), ", this is ",
                                                ToString(NodeId{own_hello_.node_id})));
  }
  if (peer_hello_.model_fingerprint != own_hello_.model_fingerprint) {
    return absl::FailedPreconditionError(
        absl::StrFormat("model fingerprint: this node serves %016x, the other %016x",
                        own_hello_.model_fingerprint, peer_hello_.model_fingerprint));
  }
  if (peer_hello_.precision != own_hello_.precision) {
    return absl::FailedPreconditionError(StrCat("precision: this node computes in ",
                                                PrecisionName(own_hello_.precision), ", the other in ",
                                                PrecisionName(peer_hello_.precision)));
  }
  return absl::OkStatus();
}

absl::Status Handshake::ReadAck(std::span<const std::byte> payload) {
  AckPayload ack;
  if (payload.size() < sizeof(ack)) {
    return absl::InvalidArgumentError(
        StrCat("Ack: expected at least ", sizeof(ack), " bytes, found ", payload.size()));
  }
  std::memcpy(&ack, payload.data(), sizeof(ack));
  if (ack.text_bytes > kAckTextBytesMax || payload.size() != sizeof(ack) + ack.text_bytes) {
    return absl::InvalidArgumentError(
        StrCat("Ack: ", ack.text_bytes, " bytes of text in ", payload.size(), " bytes of payload"));
  }
  if (ack.code == 0) return absl::OkStatus();
  refused_by_peer_ = true;
  std::string text(reinterpret_cast<const char*>(payload.data() + sizeof(ack)), ack.text_bytes);
  // It ends up in a log line of ours.
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  const auto code = ack.code <= 16 ? static_cast<absl::StatusCode>(ack.code) : absl::StatusCode::kUnknown;
  return absl::Status(code, StrCat("refused by the other side: ", text));
}

// HMAC-SHA256(secret, "minke auth 1" | prover | class | Hello of the initiator | Hello of the responder). The
// Hellos hold role, node id, versions, credits and nonce of both; the prover's byte stops a message from
// being sent back.
Mac Handshake::ComputeMac(Side prover) const {
  const bool initiator = side_ == Side::kInitiator;
  std::vector<std::byte> text;
  const auto append = [&](const void* data, size_t bytes) {
    const auto* begin = static_cast<const std::byte*>(data);
    text.insert(text.end(), begin, begin + bytes);
  };
  append("minke auth 1", 12);
  append(prover == Side::kInitiator ? "I" : "R", 1);
  append(&traffic_class_, 1);
  append(initiator ? &own_hello_ : &peer_hello_, sizeof(HelloPayload));
  append(initiator ? &peer_hello_ : &own_hello_, sizeof(HelloPayload));
  Mac mac;
  unsigned int mac_bytes = 0;
  MK_CHECK(HMAC(EVP_sha256(), secret_.data(), static_cast<int>(secret_.size()),
                reinterpret_cast<const unsigned char*>(text.data()), text.size(), mac.data(),
                &mac_bytes) != nullptr &&
           mac_bytes == mac.size());
  return mac;
}

Handshake::Message Handshake::AuthMessage() const { return {wire::Kind::kAuth, Bytes(ComputeMac(side_))}; }

absl::Status Handshake::CheckAuth(std::span<const std::byte> payload) const {
  const Mac expected = ComputeMac(side_ == Side::kInitiator ? Side::kResponder : Side::kInitiator);
  if (payload.size() != expected.size() ||
      CRYPTO_memcmp(payload.data(), expected.data(), expected.size()) != 0) {
    return absl::PermissionDeniedError("the cluster secrets differ");
  }
  return absl::OkStatus();
}

}  // namespace minke::transport::internal
