#include "libs/wire/messages.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::wire {
namespace {

// Sizes of parts are computed in 64 bits: every count in a header has 32, so no product or sum overflows.
uint64_t WorkBytes(const RowShape& shape, uint64_t rows, uint64_t pairs) {
  const uint64_t descriptors = rows * sizeof(WorkRow) + pairs * sizeof(WorkPair);
  const uint64_t offset = (descriptors + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  return offset + rows * static_cast<uint64_t>(shape.row_bytes());
}

uint64_t PartialBytes(const RowShape& shape, uint64_t rows) { return WorkBytes(shape, rows, 0); }

uint64_t RoutePlanBytes(const RowShape& shape, uint64_t rows, uint64_t servers) {
  return servers * sizeof(uint64_t) +
         rows * static_cast<uint64_t>(shape.top_k) * (sizeof(float) + 2 * sizeof(uint16_t));
}

uint32_t Narrow(uint64_t bytes) { return static_cast<uint32_t>(std::min<uint64_t>(bytes, UINT32_MAX)); }

// Largest n in [0, limit] with bytes(n) <= kPayloadBytesMax; `bytes` grows with n.
template <typename Bytes>
int32_t LargestFitting(uint64_t limit, Bytes bytes) {
  uint64_t low = 0, high = limit;
  while (low < high) {
    const uint64_t middle = (low + high + 1) / 2;
    if (bytes(middle) <= kPayloadBytesMax) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return static_cast<int32_t>(low);
}

absl::Status Malformed(const FrameHeader& header, std::string_view what, uint64_t expected, uint64_t found) {
  return absl::InvalidArgumentError(
      StrCat(ToString(header.kind), ": ", what, ": expected ", expected, ", found ", found));
}

absl::Status OutOfRange(const FrameHeader& header, std::string_view what, size_t index, uint64_t limit,
                        uint64_t found) {
  return absl::InvalidArgumentError(
      StrCat(ToString(header.kind), ": ", what, " [", index, "]: expected below ", limit, ", found ", found));
}

// No kind has flags.
absl::Status CheckKind(const FrameHeader& header, bool kind_ok, bool pairs_used) {
  if (!kind_ok) {
    return absl::InvalidArgumentError(
        StrCat("payload reader: unexpected kind ", ToString(header.kind), " flags ", int{header.flags}));
  }
  if (header.flags != 0) return Malformed(header, "flags", 0, header.flags);
  if (!pairs_used && header.pairs != 0) return Malformed(header, "pairs", 0, header.pairs);
  if (header.rows == 0) {
    return absl::InvalidArgumentError(StrCat(ToString(header.kind), ": rows: expected at least 1, found 0"));
  }
  return absl::OkStatus();
}

// The payload must be what the counts of the header say, to the byte.
absl::Status CheckSize(const FrameHeader& header, std::span<const std::byte> payload, uint64_t expected) {
  if (payload.size() != header.payload_bytes) {
    return Malformed(header, "payload bytes received", header.payload_bytes, payload.size());
  }
  if (payload.size() != expected) {
    return absl::InvalidArgumentError(StrCat(ToString(header.kind), ": payload bytes: expected ", expected,
                                             " for rows=", header.rows, " pairs=", header.pairs, ", found ",
                                             payload.size()));
  }
  MK_CHECK(reinterpret_cast<uintptr_t>(payload.data()) % alignof(uint64_t) == 0);
  return absl::OkStatus();
}

absl::Status CheckGroup(const RowShape& shape, const FrameHeader& header, std::span<const PartialRow> rows,
                        bool whole_row_allowed) {
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].reserved != 0) return Malformed(header, "reserved field of a row", 0, rows[i].reserved);
    if (rows[i].group >= shape.num_groups && !(whole_row_allowed && rows[i].group == kWholeRow)) {
      return OutOfRange(header, "group", i, shape.num_groups, rows[i].group);
    }
  }
  return absl::OkStatus();
}

template <typename T>
std::span<T> Take(std::span<std::byte>& rest, size_t count) {
  const std::span<T> taken(reinterpret_cast<T*>(rest.data()), count);
  rest = rest.subspan(taken.size_bytes());
  return taken;
}

template <typename T>
std::span<const T> Take(std::span<const std::byte>& rest, size_t count) {
  const std::span<const T> taken(reinterpret_cast<const T*>(rest.data()), count);
  rest = rest.subspan(taken.size_bytes());
  return taken;
}

// Zeroes what lies between the descriptors and the rows; returns where the rows begin.
std::byte* SkipPadding(std::span<std::byte> payload, uint32_t descriptor_bytes) {
  const uint32_t offset = RowDataOffset(descriptor_bytes);
  std::memset(payload.data() + descriptor_bytes, 0, offset - descriptor_bytes);
  return payload.data() + offset;
}

}  // namespace

std::optional<uint32_t> RowDataOffsetOf(const FrameHeader& header) {
  uint64_t descriptors = 0;
  switch (header.kind) {
    case Kind::kDispatch:
      break;
    case Kind::kExpertWork:
      descriptors = uint64_t{header.rows} * sizeof(WorkRow) + uint64_t{header.pairs} * sizeof(WorkPair);
      break;
    case Kind::kPartial:
      descriptors = uint64_t{header.rows} * sizeof(PartialRow);
      break;
    default:  // most kinds, and what is no kind
      return std::nullopt;
  }
  if (descriptors > header.payload_bytes) return std::nullopt;
  const uint32_t offset = RowDataOffset(static_cast<uint32_t>(descriptors));
  if (offset > header.payload_bytes) return std::nullopt;
  return offset;
}

absl::StatusOr<FrameHeader> ReadHead(std::span<const std::byte> head, size_t data_bytes) {
  FrameHeader header;
  if (head.size() < sizeof(header) || head.size() > sizeof(header) + kPayloadBytesMax) {
    return absl::InvalidArgumentError(
        StrCat("frame header: expected ", sizeof(header), " bytes and descriptors, found ", head.size()));
  }
  std::memcpy(&header, head.data(), sizeof(header));
  const size_t descriptor_bytes = head.size() - sizeof(header);
  if (data_bytes > kPayloadBytesMax) {
    return absl::InvalidArgumentError(
        StrCat("frame payload: expected at most ", kPayloadBytesMax, " bytes, received ", data_bytes));
  }
  MK_RETURN_IF_ERROR(ValidateHeader(header, descriptor_bytes + data_bytes));
  if (descriptor_bytes == 0) return header;
  if (header.version < kVersionRowsApart || RowDataOffsetOf(header) != descriptor_bytes) {
    return absl::InvalidArgumentError(StrCat(
        "frame header: ", descriptor_bytes, " bytes of descriptors do not belong to ", ToString(header.kind),
        " version ", int{header.version}, " rows=", header.rows, " pairs=", header.pairs));
  }
  return header;
}

int32_t DispatchRowsMax(const RowShape& shape) {
  return static_cast<int32_t>(kPayloadBytesMax / shape.row_bytes());
}

int32_t WorkRowsMax(const RowShape& shape) {
  return LargestFitting(kPayloadBytesMax, [&](uint64_t rows) {
    return WorkBytes(shape, rows, rows * static_cast<uint64_t>(shape.top_k));
  });
}

int32_t PartialRowsMax(const RowShape& shape) {
  return LargestFitting(kPayloadBytesMax, [&](uint64_t rows) { return PartialBytes(shape, rows); });
}

int32_t RoutePlanRowsMax(const RowShape& shape) {
  // Replicas: each row may name servers of its own, one per group it uses.
  const uint64_t servers_per_row = static_cast<uint64_t>(std::min(shape.top_k, shape.num_groups));
  return LargestFitting(kPayloadBytesMax,
                        [&](uint64_t rows) { return RoutePlanBytes(shape, rows, rows * servers_per_row); });
}

uint32_t WorkPayloadBytes(const RowShape& shape, uint32_t rows, uint32_t pairs) {
  return Narrow(WorkBytes(shape, rows, pairs));
}
uint32_t PartialPayloadBytes(const RowShape& shape, uint32_t rows) {
  return Narrow(PartialBytes(shape, rows));
}
uint32_t RoutePlanPayloadBytes(const RowShape& shape, uint32_t rows, uint32_t servers) {
  return Narrow(RoutePlanBytes(shape, rows, servers));
}

WorkSpans LayOutWork(const RowShape& shape, uint32_t rows, uint32_t pairs, std::span<std::byte> payload) {
  MK_CHECK(payload.size() == WorkBytes(shape, rows, pairs));
  WorkSpans spans;
  std::span<std::byte> rest = payload;
  spans.rows = Take<WorkRow>(rest, rows);
  spans.pairs = Take<WorkPair>(rest, pairs);
  spans.data = SkipPadding(payload, static_cast<uint32_t>(payload.size() - rest.size()));
  return spans;
}

PartialSpans LayOutPartial(const RowShape& shape, uint32_t rows, std::span<std::byte> payload) {
  MK_CHECK(payload.size() == PartialBytes(shape, rows));
  PartialSpans spans;
  std::span<std::byte> rest = payload;
  spans.rows = Take<PartialRow>(rest, rows);
  spans.data = SkipPadding(payload, static_cast<uint32_t>(payload.size() - rest.size()));
  return spans;
}

RoutePlanSpans LayOutRoutePlan(const RowShape& shape, uint32_t rows, uint32_t servers,
                               std::span<std::byte> payload) {
  MK_CHECK(payload.size() == RoutePlanBytes(shape, rows, servers));
  const size_t choices = size_t{rows} * static_cast<size_t>(shape.top_k);
  RoutePlanSpans spans;
  std::span<std::byte> rest = payload;
  spans.servers = Take<uint64_t>(rest, servers);
  spans.weights = Take<float>(rest, choices);
  spans.experts = Take<uint16_t>(rest, choices);
  spans.server_index = Take<uint16_t>(rest, choices);
  return spans;
}

std::span<PartialRow> LayOutRowList(uint32_t rows, std::span<std::byte> payload) {
  MK_CHECK(payload.size() == size_t{rows} * sizeof(PartialRow));
  std::span<std::byte> rest = payload;
  return Take<PartialRow>(rest, rows);
}

absl::StatusOr<WorkView> ReadWork(const RowShape& shape, const FrameHeader& header,
                                  std::span<const std::byte> payload) {
  MK_RETURN_IF_ERROR(CheckKind(header, header.kind == Kind::kExpertWork, /*pairs_used=*/true));
  MK_RETURN_IF_ERROR(CheckSize(header, payload, WorkBytes(shape, header.rows, header.pairs)));

  WorkView view;
  std::span<const std::byte> rest = payload;
  view.rows = Take<WorkRow>(rest, header.rows);
  view.pairs = Take<WorkPair>(rest, header.pairs);
  view.data = payload.data() + RowDataOffset(static_cast<uint32_t>(payload.size() - rest.size()));

  for (size_t i = 0; i < view.rows.size(); ++i) {
    const WorkRow& row = view.rows[i];
    if (row.pairs_count == 0 || row.pairs_count > shape.top_k) {
      return absl::InvalidArgumentError(StrCat(ToString(header.kind), ": pairs of row [", i,
                                               "]: expected 1..", shape.top_k, ", found ",
                                               int{row.pairs_count}));
    }
    if (uint64_t{row.pairs_begin()} + row.pairs_count > header.pairs) {
      return OutOfRange(header, "end of the pairs of row", i, uint64_t{header.pairs} + 1,
                        uint64_t{row.pairs_begin()} + row.pairs_count);
    }
    int32_t previous = -1;
    for (const WorkPair& pair : view.pairs.subspan(row.pairs_begin(), row.pairs_count)) {
      if (pair.expert <= previous) {
        return absl::InvalidArgumentError(StrCat(ToString(header.kind), ": experts of row [", i,
                                                 "] not ascending: ", pair.expert, " after ", previous));
      }
      previous = pair.expert;
    }
  }
  for (size_t i = 0; i < view.pairs.size(); ++i) {
    const WorkPair& pair = view.pairs[i];
    if (pair.reserved != 0) return Malformed(header, "reserved field of a pair", 0, pair.reserved);
    if (pair.expert >= shape.num_experts)
      return OutOfRange(header, "expert", i, shape.num_experts, pair.expert);
    if (!std::isfinite(pair.weight)) {
      return absl::InvalidArgumentError(
          StrCat(ToString(header.kind), ": weight [", i, "]: expected a finite number, found ", pair.weight));
    }
  }
  return view;
}

absl::StatusOr<const std::byte*> ReadDispatch(const RowShape& shape, const FrameHeader& header,
                                              std::span<const std::byte> payload) {
  MK_RETURN_IF_ERROR(CheckKind(header, header.kind == Kind::kDispatch, /*pairs_used=*/false));
  MK_RETURN_IF_ERROR(
      CheckSize(header, payload, uint64_t{header.rows} * static_cast<uint64_t>(shape.row_bytes())));
  if (uint64_t{header.row_begin} + header.rows > UINT32_MAX) {
    return OutOfRange(header, "end of rows", 0, UINT32_MAX, uint64_t{header.row_begin} + header.rows);
  }
  return payload.data();
}

absl::StatusOr<PartialView> ReadPartial(const RowShape& shape, const FrameHeader& header,
                                        std::span<const std::byte> payload) {
  MK_RETURN_IF_ERROR(CheckKind(header, header.kind == Kind::kPartial, /*pairs_used=*/false));
  MK_RETURN_IF_ERROR(CheckSize(header, payload, PartialBytes(shape, header.rows)));
  PartialView view;
  std::span<const std::byte> rest = payload;
  view.rows = Take<PartialRow>(rest, header.rows);
  view.data = payload.data() + RowDataOffset(static_cast<uint32_t>(view.rows.size_bytes()));
  MK_RETURN_IF_ERROR(CheckGroup(shape, header, view.rows, /*whole_row_allowed=*/false));
  return view;
}

absl::StatusOr<PartialView> ReadRowList(const RowShape& shape, const FrameHeader& header,
                                        std::span<const std::byte> payload) {
  const bool busy = header.kind == Kind::kBusy;
  MK_RETURN_IF_ERROR(CheckKind(header, busy || header.kind == Kind::kNack || header.kind == Kind::kReject,
                               /*pairs_used=*/false));
  MK_RETURN_IF_ERROR(CheckSize(header, payload, uint64_t{header.rows} * sizeof(PartialRow)));
  PartialView view;
  std::span<const std::byte> rest = payload;
  view.rows = Take<PartialRow>(rest, header.rows);
  MK_RETURN_IF_ERROR(CheckGroup(shape, header, view.rows, /*whole_row_allowed=*/busy));
  return view;
}

absl::StatusOr<RoutePlanView> ReadRoutePlan(const RowShape& shape, const FrameHeader& header,
                                            std::span<const std::byte> payload) {
  MK_RETURN_IF_ERROR(CheckKind(header, header.kind == Kind::kRoutePlan, /*pairs_used=*/true));
  if (header.pairs >= kNoServer) return OutOfRange(header, "number of servers", 0, kNoServer, header.pairs);
  if (uint64_t{header.row_begin} + header.rows > UINT32_MAX) {
    return OutOfRange(header, "end of rows", 0, UINT32_MAX, uint64_t{header.row_begin} + header.rows);
  }
  MK_RETURN_IF_ERROR(CheckSize(header, payload, RoutePlanBytes(shape, header.rows, header.pairs)));

  const size_t top_k = static_cast<size_t>(shape.top_k);
  const size_t choices = header.rows * top_k;
  RoutePlanView view;
  std::span<const std::byte> rest = payload;
  view.servers = Take<uint64_t>(rest, header.pairs);
  view.weights = Take<float>(rest, choices);
  view.experts = Take<uint16_t>(rest, choices);
  view.server_index = Take<uint16_t>(rest, choices);

  for (size_t i = 0; i < view.servers.size(); ++i) {
    if (view.servers[i] == 0) {
      return absl::InvalidArgumentError(StrCat("RoutePlan: server [", i, "]: expected a node id, found 0"));
    }
  }
  for (size_t i = 0; i < choices; ++i) {
    const bool rejected_row = i % top_k == 0 && view.weights[i] == kRejectedRowWeight;
    if (!std::isfinite(view.weights[i]) || (view.weights[i] < 0 && !rejected_row)) {
      return absl::InvalidArgumentError(StrCat(
          "RoutePlan: weight [", i, "]: expected a finite number of at least 0, found ", view.weights[i]));
    }
    if (view.experts[i] >= shape.num_experts) {
      return OutOfRange(header, "expert", i, shape.num_experts, view.experts[i]);
    }
    if (i % top_k != 0 && view.experts[i] <= view.experts[i - 1]) {
      return absl::InvalidArgumentError(StrCat("RoutePlan: experts of row [", i / top_k, "] not ascending: ",
                                               view.experts[i], " after ", view.experts[i - 1]));
    }
    if (view.server_index[i] >= view.servers.size() && view.server_index[i] != kNoServer) {
      return OutOfRange(header, "server index", i, view.servers.size(), view.server_index[i]);
    }
  }
  return view;
}

absl::StatusOr<std::span<const uint32_t>> ReadPageRequest(const FrameHeader& header,
                                                          std::span<const std::byte> payload) {
  if (header.rows % kPageTokens != 0 || header.rows > kPagesMax * kPageTokens) {
    return absl::InvalidArgumentError(StrCat("PageRequest: expected whole pages of ", kPageTokens,
                                             " tokens, at most ", kPagesMax, ", found ", header.rows,
                                             " tokens"));
  }
  if (payload.size() != size_t{header.rows} * sizeof(uint32_t)) {
    return absl::InvalidArgumentError(StrCat("PageRequest of ", header.rows, " tokens: expected ",
                                             size_t{header.rows} * sizeof(uint32_t), " bytes, found ",
                                             payload.size()));
  }
  const uint32_t pages = header.rows / kPageTokens;
  if (header.pairs != 0 || header.row_begin > (pages == 0 ? 0 : pages - 1)) {
    return absl::InvalidArgumentError(StrCat("PageRequest of ", pages,
                                             " pages: expected one of them as the first, found ",
                                             header.row_begin, " and pairs=", header.pairs));
  }
  return std::span(reinterpret_cast<const uint32_t*>(payload.data()), header.rows);
}

absl::StatusOr<const std::byte*> ReadPageTransfer(const PageShape& shape, const FrameHeader& header,
                                                  std::span<const std::byte> payload) {
  if (header.pairs > kPagesMax || header.row_begin >= header.pairs) {
    return absl::InvalidArgumentError(StrCat("PageTransfer: expected a page below pairs, and pairs at most ",
                                             kPagesMax, ", found page=", header.row_begin,
                                             " pairs=", header.pairs));
  }
  const auto layers = static_cast<uint32_t>(shape.layers);
  if (header.rows == 0 || header.layer >= layers || header.rows > layers - header.layer) {
    return absl::InvalidArgumentError(StrCat("PageTransfer: expected layers below ", shape.layers, ", found ",
                                             header.rows, " from ", header.layer));
  }
  if (payload.size() != header.rows * static_cast<uint64_t>(shape.layer_bytes)) {
    return absl::InvalidArgumentError(StrCat("PageTransfer of ", header.rows, " layers: expected ",
                                             header.rows * static_cast<uint64_t>(shape.layer_bytes),
                                             " bytes, found ", payload.size()));
  }
  return payload.data();
}

absl::Status CheckPageEnd(const FrameHeader& header, std::span<const std::byte> payload) {
  if (header.pairs > kPagesMax || header.rows != 0 || header.row_begin != 0 || !payload.empty()) {
    return absl::InvalidArgumentError(
        StrCat("PageEnd: expected at most ", kPagesMax, " pages and no payload, found pairs=", header.pairs,
               " rows=", header.rows, " row_begin=", header.row_begin, " bytes=", payload.size()));
  }
  return absl::OkStatus();
}

absl::Status CheckPageAck(const FrameHeader& header, std::span<const std::byte> payload) {
  if (header.pairs != 0 || header.rows != 0 || !payload.empty()) {
    return absl::InvalidArgumentError(StrCat("PageAck: expected a number only, found pairs=", header.pairs,
                                             " rows=", header.rows, " bytes=", payload.size()));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> ReadUnitRequest(const FrameHeader& header, std::span<const std::byte> payload) {
  if (header.rows == 0 || header.rows > kUnitPiecesMax || header.pairs != 0) {
    return absl::InvalidArgumentError(StrCat("UnitRequest: expected 1 ... ", kUnitPiecesMax,
                                             " pieces and pairs=0, found ", header.rows,
                                             " and pairs=", header.pairs));
  }
  if (payload.size() != sizeof(uint64_t)) {
    return absl::InvalidArgumentError(
        StrCat("UnitRequest: expected ", sizeof(uint64_t), " bytes, found ", payload.size()));
  }
  return *reinterpret_cast<const uint64_t*>(payload.data());
}

absl::Status CheckUnitPiece(int64_t bytes, const FrameHeader& header, std::span<const std::byte> payload) {
  const int64_t pieces = (bytes + kUnitPieceBytes - 1) / kUnitPieceBytes;
  if (header.pairs != pieces || header.row_begin >= pieces || header.rows != 1) {
    return absl::InvalidArgumentError(StrCat("UnitPiece: expected one of ", pieces, ", found ", header.rows,
                                             " from ", header.row_begin, " of ", header.pairs));
  }
  const int64_t expected =
      std::min<int64_t>(kUnitPieceBytes, bytes - int64_t{header.row_begin} * kUnitPieceBytes);
  if (std::ssize(payload) != expected) {
    return absl::InvalidArgumentError(StrCat("UnitPiece ", header.row_begin, " of ", pieces, ": expected ",
                                             expected, " bytes, found ", payload.size()));
  }
  return absl::OkStatus();
}

absl::Status CheckUnitAbsent(const FrameHeader& header, std::span<const std::byte> payload) {
  if (header.pairs != 0 || header.rows != 0 || header.row_begin != 0 || !payload.empty()) {
    return absl::InvalidArgumentError(StrCat("UnitAbsent: expected a header only, found pairs=", header.pairs,
                                             " rows=", header.rows, " row_begin=", header.row_begin,
                                             " bytes=", payload.size()));
  }
  return absl::OkStatus();
}

}  // namespace minke::wire
