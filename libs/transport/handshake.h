// The handshake of one lane, without I/O: Hello -> <- Hello, Auth -> <- Auth, Ack -> <- Ack, one message
// under way at a time. Auth proves the cluster secret over both Hellos; an Ack with a code refuses.
// docs/wire_format.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "libs/transport/transport.h"
#include "libs/wire/frame.h"

namespace minke::transport::internal {

struct HelloPayload {
  uint64_t node_id = 0;
  uint64_t expected_peer =
      0;  // whom the initiator believes to reach; the responder repeats the initiator's id
  uint64_t model_fingerprint = 0;
  uint8_t nonce[32] = {};
  uint32_t credit_rows[wire::kNumTrafficClasses] = {};  // granted to the receiver of this Hello
  uint32_t heartbeat_ms = 0;
  uint8_t version_oldest = 0;
  uint8_t version_newest = 0;
  uint8_t role = 0;
  uint8_t precision = 0;
  uint8_t takes_rows = 0;     // 1: has row memory, to which rows may come apart (wire version 2)
  uint8_t reserved[23] = {};  // sent as zero, ignored (but authenticated) when received
};
static_assert(sizeof(HelloPayload) == 96 && offsetof(HelloPayload, nonce) == 24 &&
              offsetof(HelloPayload, credit_rows) == 56 && offsetof(HelloPayload, role) == 70);

using Mac = std::array<uint8_t, 32>;

struct AckPayload {   // followed by text_bytes of UTF-8
  uint32_t code = 0;  // absl::StatusCode; 0 accepts
  uint32_t text_bytes = 0;
};
inline constexpr uint32_t kAckTextBytesMax = 512;

struct Versions {
  uint8_t oldest = wire::kVersionOldest;
  uint8_t newest = wire::kVersion;
};

// Thread-compatible.
class Handshake {
 public:
  enum class Side { kInitiator, kResponder };
  struct Message {
    wire::Kind kind;
    std::vector<std::byte> payload;
  };
  struct Step {
    std::optional<Message> answer;  // to be sent, also with a failure
    absl::Status status;            // not OK: the handshake has failed
  };

  // `expected_peer` is for the initiator. `versions` differ from the build's only in tests.
  Handshake(Side side, const Identity& self, const TransportOptions& options,
            wire::TrafficClass traffic_class, NodeId expected_peer = {}, Versions versions = {});

  // Initiator: the first message.
  Message Start();
  Step Receive(wire::Kind kind, std::span<const std::byte> payload);
  // Responder, when must_decide(): goes on, or refuses.
  bool must_decide() const { return state_ == State::kDecide; }
  Message Accept();
  Message Refuse(const absl::Status& status);

  bool done() const { return state_ == State::kDone; }
  // The peer has done its part: its frames may come before its Ack, so keep them.
  bool awaits_ack() const { return state_ == State::kExpectAck; }
  // True if it was the other side that said no.
  bool refused_by_peer() const { return refused_by_peer_; }
  Side side() const { return side_; }
  // Lane of the link; the responder learns it from the header of the Hello before Receive().
  wire::TrafficClass traffic_class() const { return traffic_class_; }
  void set_traffic_class(wire::TrafficClass traffic_class) { traffic_class_ = traffic_class; }

  // Valid once the peer's Hello was received.
  const HelloPayload& peer_hello() const { return peer_hello_; }
  uint8_t version() const { return version_; }

 private:
  enum class State { kStart, kExpectHello, kDecide, kExpectAuth, kExpectAck, kDone, kFailed };

  absl::Status ReadHello(std::span<const std::byte> payload);
  absl::Status CheckAuth(std::span<const std::byte> payload) const;
  absl::Status ReadAck(std::span<const std::byte> payload);
  Mac ComputeMac(Side prover) const;
  Message AuthMessage() const;
  Step Fail(absl::Status status, bool tell_peer);

  const Side side_;
  const std::string secret_;
  const NodeId expected_peer_;
  const Versions versions_;
  HelloPayload own_hello_;
  HelloPayload peer_hello_;
  wire::TrafficClass traffic_class_;
  State state_ = State::kStart;
  uint8_t version_ = 0;
  bool refused_by_peer_ = false;
};

}  // namespace minke::transport::internal
