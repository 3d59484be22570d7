#include "libs/wire/frame.h"

#include "absl/strings/str_format.h"
#include "libs/base/strings.h"

namespace minke::wire {
namespace {

// Known kinds have a name.
std::string_view NameOrEmpty(Kind kind) {
  switch (kind) {
    case Kind::kHello:
      return "Hello";
    case Kind::kAuth:
      return "Auth";
    case Kind::kAck:
      return "Ack";
    case Kind::kHeartbeat:
      return "Heartbeat";
    case Kind::kCredit:
      return "Credit";
    case Kind::kGoodbye:
      return "Goodbye";
    case Kind::kDispatch:
      return "Dispatch";
    case Kind::kRoutePlan:
      return "RoutePlan";
    case Kind::kExpertWork:
      return "ExpertWork";
    case Kind::kPartial:
      return "Partial";
    case Kind::kNack:
      return "Nack";
    case Kind::kBusy:
      return "Busy";
    case Kind::kReject:
      return "Reject";
    case Kind::kPageRequest:
      return "PageRequest";
    case Kind::kPageTransfer:
      return "PageTransfer";
    case Kind::kPageEnd:
      return "PageEnd";
    case Kind::kPageAck:
      return "PageAck";
    case Kind::kUnitRequest:
      return "UnitRequest";
    case Kind::kUnitPiece:
      return "UnitPiece";
    case Kind::kUnitAbsent:
      return "UnitAbsent";
  }
  return {};
}

}  // namespace

std::string_view ToString(Kind kind) {
  const std::string_view name = NameOrEmpty(kind);
  return name.empty() ? "unknown" : name;
}

absl::Status ValidateHeader(const FrameHeader& header, size_t payload_bytes_received) {
  if (header.magic != kMagic) {
    return absl::InvalidArgumentError(
        absl::StrFormat("frame magic: expected 0x%08x, found 0x%08x", kMagic, header.magic));
  }
  if (NameOrEmpty(header.kind).empty()) {
    return absl::InvalidArgumentError(
        StrCat("frame kind: expected 1..6 or 16..29, found ", static_cast<int>(header.kind)));
  }
  const uint8_t oldest = IsHandshakeKind(header.kind) ? kHandshakeVersion : kVersionOldest;
  const uint8_t newest = IsHandshakeKind(header.kind) ? kHandshakeVersion : kVersion;
  if (header.version < oldest || header.version > newest) {
    return absl::InvalidArgumentError(StrCat("frame version: expected ", int{oldest}, "..", int{newest},
                                             " for ", ToString(header.kind), ", found ",
                                             int{header.version}));
  }
  if (static_cast<uint8_t>(header.traffic_class) >= kNumTrafficClasses) {
    return absl::InvalidArgumentError(StrCat("frame class: expected 0..", kNumTrafficClasses - 1, ", found ",
                                             static_cast<int>(header.traffic_class)));
  }
  if (header.reserved != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("frame reserved field: expected 0, found 0x%x", header.reserved));
  }
  if (header.payload_bytes > kPayloadBytesMax) {
    return absl::InvalidArgumentError(
        StrCat("frame payload: expected at most ", kPayloadBytesMax, " bytes, found ", header.payload_bytes));
  }
  if (header.payload_bytes != payload_bytes_received) {
    return absl::InvalidArgumentError(StrCat("frame payload: header says ", header.payload_bytes,
                                             " bytes, received ", payload_bytes_received));
  }
  return absl::OkStatus();
}

}  // namespace minke::wire
