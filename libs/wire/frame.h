// What one data-plane message looks like: 64 bytes of header, then a payload whose layout the kind decides.
// Format: docs/wire_format.md (wire version 2). Little-endian; every reserved byte is zero.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "libs/base/ids.h"

namespace minke::wire {

inline constexpr uint32_t kMagic = 0x314b4e4d;  // "MNK1"
// The version this build speaks, and the oldest it still understands (N and N-1 talk to each other). The
// handshake agrees on one; its own frames always say kHandshakeVersion, so that strangers can be told why
// not.
inline constexpr uint8_t kVersion = 2;
inline constexpr uint8_t kVersionOldest = 1;
inline constexpr uint8_t kVersionRowsApart = 2;  // from it on descriptors may travel apart from their rows
inline constexpr uint8_t kHandshakeVersion = 1;
static_assert(std::endian::native == std::endian::little, "headers and payloads are used where they lie");

// A message never exceeds this, so that a decode row never waits long behind a prefill message.
inline constexpr uint32_t kPayloadBytesMax = 256 * 1024;
// Row data in a payload begins at a multiple of this.
inline constexpr uint32_t kRowAlignment = 64;

enum class Kind : uint8_t {
  kHello = 1,        // handshake, first message each way           (transport)
  kAuth = 2,         // handshake, proof of the cluster secret      (transport)
  kAck = 3,          // handshake done; or refused, with a reason   (transport)
  kHeartbeat = 4,    //                                             (transport)
  kCredit = 5,       // only returns credits                        (transport)
  kGoodbye = 6,      // the sender leaves in good order             (transport)
  kDispatch = 16,    // attention -> router: rows to route
  kRoutePlan = 17,   // router -> attention: experts, weights and servers of each row
  kExpertWork = 18,  // router or attention -> expert server: rows and their (expert, weight) pairs
  kPartial = 19,     // expert server -> attention: sums per (row, group)
  kNack = 20,        // expert server -> attention: units it does not host
  kBusy = 21,        // router -> attention: rows it could not take now
  kReject = 22,      // expert server -> attention: (row, group) whose sum is not finite
  // Attention to attention; fetcher: the node that gets the pages, and the frames' origin.
  kPageRequest = 23,   // fetcher -> giver: the pages of a prefix, or no more of them
  kPageTransfer = 24,  // giver -> fetcher: some layers of a page
  kPageEnd = 25,       // giver -> fetcher: all it has was sent
  kPageAck = 26,       // fetcher -> giver: transfers taken so far
  // Expert server to expert server; fetcher: the node that loads the unit, and the frames' origin.
  kUnitRequest = 27,  // fetcher -> giver: pieces of a unit's packed weights
  kUnitPiece = 28,    // giver -> fetcher: one of them
  kUnitAbsent = 29,   // giver -> fetcher: the unit is not here, or packed otherwise
};

// Decode comes before prefill everywhere; the two have separate lanes and credits.
enum class TrafficClass : uint8_t { kDecode = 0, kPrefill = 1 };
inline constexpr int kNumTrafficClasses = 2;

// One exchange is (origin, step, layer, microbatch, attempt): the rows one microbatch sends through one MoE
// layer. Fields a kind does not use are zero.
struct FrameHeader {
  uint32_t magic = kMagic;
  uint8_t version = kVersion;
  Kind kind{};
  TrafficClass traffic_class{};
  uint8_t flags = 0;        // none is defined yet
  uint32_t epoch_term = 0;  // placement table the sender used or knows
  uint32_t epoch_counter = 0;
  uint64_t origin = 0;  // NodeId of the attention node that owns the exchange
  uint64_t step = 0;    // of the origin's engine
  uint16_t layer = 0;
  uint16_t microbatch = 0;
  uint32_t attempt = 0;
  uint32_t rows = 0;   // row descriptors in this message
  uint32_t pairs = 0;  // kind-specific second count
  uint32_t payload_bytes = 0;
  uint32_t credits = 0;  // rows of credit of this class given back to the receiver (filled by the transport)
  uint32_t row_begin = 0;  // index in the exchange of the message's first row (Dispatch, RoutePlan)
  uint32_t reserved = 0;

  Epoch epoch() const { return Epoch{epoch_term, epoch_counter}; }
  void set_epoch(Epoch epoch) { epoch_term = epoch.term, epoch_counter = epoch.counter; }
};
static_assert(sizeof(FrameHeader) == 64 && alignof(FrameHeader) == 8);
static_assert(offsetof(FrameHeader, epoch_term) == 8 && offsetof(FrameHeader, origin) == 16 &&
              offsetof(FrameHeader, step) == 24 && offsetof(FrameHeader, layer) == 32 &&
              offsetof(FrameHeader, attempt) == 36 && offsetof(FrameHeader, rows) == 40 &&
              offsetof(FrameHeader, payload_bytes) == 48 && offsetof(FrameHeader, row_begin) == 56);

std::string_view ToString(Kind kind);
inline bool IsTransportKind(Kind kind) { return static_cast<uint8_t>(kind) < 16; }
inline bool IsHandshakeKind(Kind kind) {
  return kind == Kind::kHello || kind == Kind::kAuth || kind == Kind::kAck;
}

// INVALID_ARGUMENT unless magic, version, kind, class and reserved fields are valid and
// payload_bytes == `payload_bytes_received` <= kPayloadBytesMax.
absl::Status ValidateHeader(const FrameHeader& header, size_t payload_bytes_received);

}  // namespace minke::wire
