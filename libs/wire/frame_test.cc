#include "libs/wire/frame.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

namespace minke::wire {
namespace {

using ::testing::HasSubstr;

FrameHeader Valid() {
  FrameHeader header;
  header.kind = Kind::kPartial;
  header.payload_bytes = 128;
  return header;
}

void ExpectRefused(const FrameHeader& header, size_t received, const char* message) {
  const absl::Status status = ValidateHeader(header, received);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(message));
}

TEST(ValidateHeader, AcceptsEveryKindInBothClasses) {
  for (int kind : {1, 2, 3, 4, 5, 6, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26}) {
    for (int traffic_class : {0, 1}) {
      FrameHeader header = Valid();
      header.kind = static_cast<Kind>(kind);
      if (IsHandshakeKind(header.kind)) header.version = kHandshakeVersion;
      header.traffic_class = static_cast<TrafficClass>(traffic_class);
      EXPECT_TRUE(ValidateHeader(header, 128).ok()) << kind;
      EXPECT_NE(ToString(header.kind), "unknown");
      EXPECT_EQ(IsTransportKind(header.kind), kind < 16);
    }
  }
}

TEST(ValidateHeader, RefusesEveryOtherKind) {
  int refused = 0;
  for (int kind = 0; kind < 256; ++kind) {
    FrameHeader header = Valid();
    header.kind = static_cast<Kind>(kind);
    if (IsHandshakeKind(header.kind)) header.version = kHandshakeVersion;
    if (!ValidateHeader(header, 128).ok()) ++refused;
  }
  EXPECT_EQ(refused, 256 - 20);
}

TEST(ValidateHeader, RefusesWrongMagicVersionClassAndReserved) {
  FrameHeader header = Valid();
  header.magic ^= 1;
  ExpectRefused(header, 128, "magic");
  header = Valid();
  header.version = kVersion + 1;
  ExpectRefused(header, 128, "version");
  header = Valid();
  header.version = kVersionOldest - 1;
  ExpectRefused(header, 128, "version");
  header = Valid();
  header.traffic_class = static_cast<TrafficClass>(2);
  ExpectRefused(header, 128, "class");
  header = Valid();
  header.reserved = 7;
  ExpectRefused(header, 128, "reserved");
}

TEST(ValidateHeader, RefusesLengthsThatDisagree) {
  ExpectRefused(Valid(), 127, "received 127");
  ExpectRefused(Valid(), 129, "received 129");
  FrameHeader header = Valid();
  header.payload_bytes = kPayloadBytesMax + 1;
  ExpectRefused(header, kPayloadBytesMax + 1, "at most");
  header.payload_bytes = UINT32_MAX;
  ExpectRefused(header, size_t{UINT32_MAX}, "at most");
  header.payload_bytes = kPayloadBytesMax;
  EXPECT_TRUE(ValidateHeader(header, kPayloadBytesMax).ok());
}

TEST(FrameHeader, LittleEndianLayoutIsTheDocumentedOne) {
  FrameHeader header;
  header.kind = Kind::kDispatch;
  header.traffic_class = TrafficClass::kPrefill;
  header.flags = 1;
  header.set_epoch(Epoch{2, 3});
  header.origin = 0x0102030405060708;
  header.step = 9;
  header.layer = 10;
  header.microbatch = 11;
  header.attempt = 12;
  header.rows = 13;
  header.pairs = 14;
  header.payload_bytes = 15;
  header.credits = 16;
  header.row_begin = 17;
  unsigned char bytes[64];
  std::memcpy(bytes, &header, 64);
  const unsigned char expected[64] = {'M', 'N', 'K', '1', 2,  16, 1, 1, 2,  0, 0, 0, 3,  0, 0, 0,
                                      8,   7,   6,   5,   4,  3,  2, 1, 9,  0, 0, 0, 0,  0, 0, 0,
                                      10,  0,   11,  0,   12, 0,  0, 0, 13, 0, 0, 0, 14, 0, 0, 0,
                                      15,  0,   0,   0,   16, 0,  0, 0, 17, 0, 0, 0, 0,  0, 0, 0};
  EXPECT_EQ(std::memcmp(bytes, expected, 64), 0);
}

}  // namespace
}  // namespace minke::wire
