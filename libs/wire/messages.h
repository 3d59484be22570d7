// Payload layouts of the data-plane messages and checked views over received ones (docs/wire_format.md).
// Writers fill caller-owned memory; readers check every length and index against the bytes received before
// anything is used, and return INVALID_ARGUMENT that names expected and found.
//
// "row" below is a row's index in its exchange (0-based, the order in which the attention node laid the
// microbatch out). Row data are [rows, hidden] in the activation dtype, at a multiple of kRowAlignment.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "absl/status/statusor.h"
#include "libs/wire/frame.h"

namespace minke::wire {

// Shapes both sides know from the model; never sent.
struct RowShape {
  int32_t hidden = 0;
  int32_t top_k = 0;  // num_experts_per_tok
  int32_t num_experts = 0;
  int32_t num_groups = 0;        // placement groups
  int32_t activation_bytes = 2;  // 4: f32, 2: bf16
  int64_t row_bytes() const { return int64_t{hidden} * activation_bytes; }
};

// ---- Dispatch
// ----------------------------------------------------------------------------------------------- payload =
// row data [rows, hidden]; row i of the message is row_begin + i. The epoch in the header is the least the
// router must have.

// ---- RoutePlan
// ---------------------------------------------------------------------------------------------- payload =
// uint64 servers[header.pairs] (NodeIds), float weights[rows][k], uint16 experts[rows][k] (ascending in a
// row), uint16 server_index[rows][k] (into servers; kNoServer: no server hosts the expert's group now, its
// rows were not sent). Rows are row_begin ... row_begin + rows - 1.
inline constexpr uint16_t kNoServer = 0xffff;
// First weight of a row that the gate rejected because its scores are not finite: the row can never be done,
// nothing of it was sent, and its other weights mean nothing. Gate weights are never negative.
inline constexpr float kRejectedRowWeight = -1.0f;

// ---- ExpertWork
// --------------------------------------------------------------------------------------------- payload =
// WorkRow[rows], WorkPair[header.pairs], padding, row data. Only pairs of the receiver. One row and its
// (expert, weight) pairs: pairs[pairs_begin, pairs_begin + pairs_count), experts ascending.
struct WorkRow {
  uint32_t row = 0;
  uint16_t pairs_begin_low = 0;  // pairs_begin = low | high << 16
  uint8_t pairs_begin_high = 0;
  uint8_t pairs_count = 0;
  uint32_t pairs_begin() const { return pairs_begin_low | uint32_t{pairs_begin_high} << 16; }
  void set_pairs(uint32_t begin, uint32_t count) {
    pairs_begin_low = static_cast<uint16_t>(begin);
    pairs_begin_high = static_cast<uint8_t>(begin >> 16);
    pairs_count = static_cast<uint8_t>(count);
  }
};
static_assert(sizeof(WorkRow) == 8);
struct WorkPair {
  float weight = 0;
  uint16_t expert = 0;
  uint16_t reserved = 0;
};
static_assert(sizeof(WorkPair) == 8);

// ---- Partial
// ------------------------------------------------------------------------------------------------ payload =
// PartialRow[rows], padding, row data: the weighted sum of the row's experts in `group`.
struct PartialRow {
  uint32_t row = 0;
  uint16_t group = 0;
  uint16_t reserved = 0;
};
static_assert(sizeof(PartialRow) == 8);

// ---- Nack, Busy, Reject
// ------------------------------------------------------------------------------------- payload =
// PartialRow[rows] (row, group) without data. Nack and Reject come from expert servers; Nack's epoch is the
// one the server knows. Busy comes from routers; its group is kWholeRow when the row was not routed at all.
inline constexpr uint16_t kWholeRow = 0xffff;

// ---- PageRequest, PageTransfer, PageEnd, PageAck
// -------------------------------------------------------------- Pages of the latent cache on their way
// between attention nodes. header.step: number of the fetch, the fetcher's; header.origin: the fetcher.
//   PageRequest   row_begin: first page wanted; rows: tokens; payload = uint32 tokens[rows], of the whole
//   prefix,
//                 whole pages. rows 0: the fetch is over, nothing more is wanted.
//   PageTransfer  row_begin: page of the prefix; layer: first layer; rows: layers; pairs: pages of the prefix
//   that
//                 the giver has; payload = [rows, 64, latent_dim] in the activation dtype.
//   PageEnd       pairs: pages of the prefix that the giver has. No payload.
//   PageAck       row_begin: PageTransfers taken so far. No payload.
inline constexpr uint32_t kPageTokens = 64;
inline constexpr uint32_t kPagesMax = 1024;  // of a prefix: 1,024 x 64 tokens x 4 B = one payload
static_assert(kPagesMax * kPageTokens * sizeof(uint32_t) == kPayloadBytesMax);
struct PageShape {
  int32_t layers = 0;
  int64_t layer_bytes = 0;  // of one page in one layer
  bool Fits() const { return layer_bytes > 0 && layer_bytes <= kPayloadBytesMax; }  // otherwise pages stay
  int32_t LayersMax() const { return static_cast<int32_t>(kPayloadBytesMax / layer_bytes); }  // of a transfer
};

// ---- UnitRequest, UnitPiece, UnitAbsent
// ----------------------------------------------------------------------- A unit's packed weights on their
// way between expert servers, in pieces of kUnitPieceBytes (the last one may be shorter). header.step: number
// of the fetch, the fetcher's; header.origin: the fetcher; layer, microbatch: the unit's layer and group.
//   UnitRequest   row_begin: first piece wanted; rows: pieces, 1 ... kUnitPiecesMax; payload = uint64, the
//   name of the
//                 layout in which the fetcher packs this unit.
//   UnitPiece     row_begin: which piece; pairs: pieces of the unit; payload = its bytes.
//   UnitAbsent    no payload.
inline constexpr uint32_t kUnitPieceBytes = kPayloadBytesMax;
inline constexpr uint32_t kUnitPiecesMax = 64;  // of one request

// Byte offset of the row data behind `descriptor_bytes` of descriptors.
inline uint32_t RowDataOffset(uint32_t descriptor_bytes) {
  return (descriptor_bytes + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}
// Where the row data of a message begin in its payload, from its header alone. Nothing: its kind has no row
// data, or they would begin behind the payload.
std::optional<uint32_t> RowDataOffsetOf(const FrameHeader& header);
// The header of a message whose row data may come apart from it: `head` is the header, followed by nothing or
// by all of the payload that is before the row data, and `data_bytes` come beside it. INVALID_ARGUMENT unless
// ValidateHeader passes and, from wire version 2 on only, what follows the header ends where its kind's row
// data begin.
absl::StatusOr<FrameHeader> ReadHead(std::span<const std::byte> head, size_t data_bytes);
// Rows of a message of each kind that fit into kPayloadBytesMax, at least 1 for every supported shape.
int32_t DispatchRowsMax(const RowShape& shape);
int32_t WorkRowsMax(const RowShape& shape);  // ExpertWork, top_k pairs each
int32_t PartialRowsMax(const RowShape& shape);
int32_t RoutePlanRowsMax(const RowShape& shape);

// Sizes of payloads.
uint32_t WorkPayloadBytes(const RowShape& shape, uint32_t rows, uint32_t pairs);
uint32_t PartialPayloadBytes(const RowShape& shape, uint32_t rows);
uint32_t RoutePlanPayloadBytes(const RowShape& shape, uint32_t rows, uint32_t servers);

// Where a writer puts its descriptors and rows; spans point into `payload`, padding is already zero.
// REQUIRES: payload is 8-byte aligned and has exactly the size that the function above gives.
struct WorkSpans {
  std::span<WorkRow> rows;
  std::span<WorkPair> pairs;
  std::byte* data = nullptr;  // [rows, hidden]
};
struct PartialSpans {
  std::span<PartialRow> rows;
  std::byte* data = nullptr;  // [rows, hidden]
};
struct RoutePlanSpans {
  std::span<uint64_t> servers;
  std::span<float> weights;          // [rows, k]
  std::span<uint16_t> experts;       // [rows, k]
  std::span<uint16_t> server_index;  // [rows, k]
};
WorkSpans LayOutWork(const RowShape& shape, uint32_t rows, uint32_t pairs, std::span<std::byte> payload);
PartialSpans LayOutPartial(const RowShape& shape, uint32_t rows, std::span<std::byte> payload);
RoutePlanSpans LayOutRoutePlan(const RowShape& shape, uint32_t rows, uint32_t servers,
                               std::span<std::byte> payload);
// Nack, Busy, Reject. REQUIRES: payload is rows * sizeof(PartialRow) bytes.
std::span<PartialRow> LayOutRowList(uint32_t rows, std::span<std::byte> payload);

// Views; spans point into the payload and live as long as it does. A message has at least one row. That a row
// index is inside its exchange, and not twice in a message, is for the reader's owner to check.
struct WorkView {
  std::span<const WorkRow> rows;
  std::span<const WorkPair> pairs;
  const std::byte* data = nullptr;  // [rows, hidden]
};
struct PartialView {
  std::span<const PartialRow> rows;
  const std::byte* data = nullptr;  // [rows, hidden]; null for Nack, Busy, Reject
};
struct RoutePlanView {
  std::span<const uint64_t> servers;
  std::span<const float> weights;          // [rows, k]
  std::span<const uint16_t> experts;       // [rows, k]
  std::span<const uint16_t> server_index;  // [rows, k]
};

// REQUIRES (all): ValidateHeader passed; payload is 8-byte aligned (frames are).
// ExpertWork. Every row has 1 ... top_k pairs with ascending experts and finite weights.
absl::StatusOr<WorkView> ReadWork(const RowShape& shape, const FrameHeader& header,
                                  std::span<const std::byte> payload);
// The row data.
absl::StatusOr<const std::byte*> ReadDispatch(const RowShape& shape, const FrameHeader& header,
                                              std::span<const std::byte> payload);
absl::StatusOr<PartialView> ReadPartial(const RowShape& shape, const FrameHeader& header,
                                        std::span<const std::byte> payload);
absl::StatusOr<PartialView> ReadRowList(const RowShape& shape, const FrameHeader& header,
                                        std::span<const std::byte> payload);  // Nack, Busy, Reject
absl::StatusOr<RoutePlanView> ReadRoutePlan(const RowShape& shape, const FrameHeader& header,
                                            std::span<const std::byte> payload);
// The prefix's tokens; empty: the fetch is over.
absl::StatusOr<std::span<const uint32_t>> ReadPageRequest(const FrameHeader& header,
                                                          std::span<const std::byte> payload);
// The latents.
absl::StatusOr<const std::byte*> ReadPageTransfer(const PageShape& shape, const FrameHeader& header,
                                                  std::span<const std::byte> payload);
absl::Status CheckPageEnd(const FrameHeader& header, std::span<const std::byte> payload);
absl::Status CheckPageAck(const FrameHeader& header, std::span<const std::byte> payload);
// The name of the layout.
absl::StatusOr<uint64_t> ReadUnitRequest(const FrameHeader& header, std::span<const std::byte> payload);
// OK: the piece is one of a unit of `bytes` bytes, and whole.
absl::Status CheckUnitPiece(int64_t bytes, const FrameHeader& header, std::span<const std::byte> payload);
absl::Status CheckUnitAbsent(const FrameHeader& header, std::span<const std::byte> payload);

}  // namespace minke::wire
