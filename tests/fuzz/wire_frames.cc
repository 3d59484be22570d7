// Frames of the data plane: a header as it arrived, and every payload reader over what came with it. Views
// lie inside the payload, every index inside what it indexes, and what a writer lays out reads back the same.
#include <algorithm>
#include <cmath>
#include <vector>

#include "libs/wire/messages.h"
#include "tests/fuzz/fuzz.h"

namespace minke::wire {
namespace {

using Bytes = std::span<const std::byte>;

template <typename T>
bool Inside(std::span<const T> part, Bytes payload) {
  const Bytes bytes = std::as_bytes(part);
  return bytes.empty() ||
         (bytes.data() >= payload.data() && bytes.data() + bytes.size() <= payload.data() + payload.size());
}
bool Inside(const std::byte* data, int64_t bytes, Bytes payload) {
  return Inside(Bytes(data, static_cast<size_t>(bytes)), payload);
}

// Reads every byte, so that a view too long is seen by AddressSanitizer.
void Touch(Bytes bytes) {
  volatile uint8_t sum = 0;
  for (const std::byte b : bytes) sum = sum + static_cast<uint8_t>(b);
}

void CheckWork(const RowShape& shape, const FrameHeader& header, Bytes payload) {
  const auto work = ReadWork(shape, header, payload);
  if (!work.ok()) return;
  FUZZ_ASSERT(work->rows.size() == header.rows && work->pairs.size() == header.pairs);
  FUZZ_ASSERT(Inside(work->rows, payload) && Inside(work->pairs, payload));
  FUZZ_ASSERT(Inside(work->data, header.rows * shape.row_bytes(), payload));
  for (const WorkRow& row : work->rows) {
    FUZZ_ASSERT(row.pairs_count >= 1 && row.pairs_count <= shape.top_k);
    for (const WorkPair& pair : work->pairs.subspan(row.pairs_begin(), row.pairs_count))
      FUZZ_ASSERT(pair.expert < shape.num_experts && std::isfinite(pair.weight));
  }
  FUZZ_ASSERT(WorkPayloadBytes(shape, header.rows, header.pairs) == payload.size());
  std::vector<uint64_t> again((payload.size() + 7) / 8);
  const std::span<std::byte> out = std::as_writable_bytes(std::span(again)).first(payload.size());
  const WorkSpans spans = LayOutWork(shape, header.rows, header.pairs, out);
  std::copy(work->rows.begin(), work->rows.end(), spans.rows.begin());
  std::copy(work->pairs.begin(), work->pairs.end(), spans.pairs.begin());
  std::memcpy(spans.data, work->data, header.rows * shape.row_bytes());
  const auto read = ReadWork(shape, header, out);
  FUZZ_ASSERT(read.ok());
  FUZZ_ASSERT(std::memcmp(read->rows.data(), work->rows.data(), work->rows.size_bytes()) == 0);
  FUZZ_ASSERT(std::memcmp(read->data, work->data, header.rows * shape.row_bytes()) == 0);
}

void CheckPartials(const RowShape& shape, const FrameHeader& header, Bytes payload) {
  if (const auto partial = ReadPartial(shape, header, payload); partial.ok()) {
    FUZZ_ASSERT(partial->rows.size() == header.rows && Inside(partial->rows, payload));
    FUZZ_ASSERT(Inside(partial->data, header.rows * shape.row_bytes(), payload));
    for (const PartialRow& row : partial->rows) FUZZ_ASSERT(row.group < shape.num_groups);
    FUZZ_ASSERT(PartialPayloadBytes(shape, header.rows) == payload.size());
  }
  if (const auto list = ReadRowList(shape, header, payload); list.ok()) {
    FUZZ_ASSERT(list->rows.size() == header.rows && Inside(list->rows, payload) && list->data == nullptr);
    for (const PartialRow& row : list->rows)
      FUZZ_ASSERT(row.group < shape.num_groups || (row.group == kWholeRow && header.kind == Kind::kBusy));
  }
}

void CheckPlan(const RowShape& shape, const FrameHeader& header, Bytes payload) {
  const auto plan = ReadRoutePlan(shape, header, payload);
  if (!plan.ok()) return;
  const size_t choices = size_t{header.rows} * shape.top_k;
  FUZZ_ASSERT(plan->servers.size() == header.pairs && plan->weights.size() == choices);
  FUZZ_ASSERT(plan->experts.size() == choices && plan->server_index.size() == choices);
  FUZZ_ASSERT(Inside(plan->servers, payload) && Inside(plan->weights, payload) &&
              Inside(plan->experts, payload) && Inside(plan->server_index, payload));
  for (size_t i = 0; i < choices; ++i) {
    FUZZ_ASSERT(plan->experts[i] < shape.num_experts);
    FUZZ_ASSERT(plan->server_index[i] < plan->servers.size() || plan->server_index[i] == kNoServer);
    FUZZ_ASSERT(plan->weights[i] >= 0 || plan->weights[i] == kRejectedRowWeight);
  }
  FUZZ_ASSERT(RoutePlanPayloadBytes(shape, header.rows, header.pairs) == payload.size());
}

// Rows apart from their descriptors: there is one place to part them, and where they do not come apart at all
// is decided by the header alone.
void CheckHead(const FrameHeader& header, Bytes payload) {
  std::vector<std::byte> all(sizeof(header) + payload.size());
  std::memcpy(all.data(), &header, sizeof(header));
  if (!payload.empty()) std::memcpy(all.data() + sizeof(header), payload.data(), payload.size());
  const auto offset = RowDataOffsetOf(header);
  if (offset.has_value()) FUZZ_ASSERT(*offset <= header.payload_bytes && *offset % kRowAlignment == 0);
  const bool valid = ValidateHeader(header, payload.size()).ok();
  FUZZ_ASSERT(ReadHead(Bytes(all).first(sizeof(header)), payload.size()).ok() == valid);
  const size_t step = std::max<size_t>(1, payload.size() / 64);
  for (size_t part = 1; part <= payload.size(); part += step) {
    const bool ok = ReadHead(Bytes(all).first(sizeof(header) + part), payload.size() - part).ok();
    FUZZ_ASSERT(ok == (valid && header.version >= kVersionRowsApart && offset == part));
  }
}

void CheckPagesAndUnits(const FrameHeader& header, Bytes payload, uint8_t bits) {
  if (header.kind == Kind::kPageRequest) {
    if (const auto tokens = ReadPageRequest(header, payload); tokens.ok()) {
      FUZZ_ASSERT(Inside(*tokens, payload) && tokens->size() == header.rows);
      FUZZ_ASSERT(tokens->size() % kPageTokens == 0 && tokens->size() <= kPagesMax * kPageTokens);
    }
  } else if (header.kind == Kind::kPageTransfer) {
    const PageShape shape{.layers = 1 + bits % 8, .layer_bytes = 64 * (1 + bits / 16)};
    if (const auto latents = ReadPageTransfer(shape, header, payload); latents.ok()) {
      FUZZ_ASSERT(Inside(*latents, header.rows * shape.layer_bytes, payload));
      FUZZ_ASSERT(header.layer + header.rows <= static_cast<uint32_t>(shape.layers));
    }
  } else if (header.kind == Kind::kPageEnd) {
    (void)CheckPageEnd(header, payload);
  } else if (header.kind == Kind::kPageAck) {
    (void)CheckPageAck(header, payload);
  } else if (header.kind == Kind::kUnitRequest) {
    if (ReadUnitRequest(header, payload).ok()) FUZZ_ASSERT(header.rows >= 1 && header.rows <= kUnitPiecesMax);
  } else if (header.kind == Kind::kUnitPiece) {
    const int64_t unit_bytes = 1 + int64_t{bits} * 4099;
    if (CheckUnitPiece(unit_bytes, header, payload).ok()) {
      FUZZ_ASSERT(int64_t{header.row_begin} * kUnitPieceBytes + static_cast<int64_t>(payload.size()) <=
                  unit_bytes);
    }
  } else if (header.kind == Kind::kUnitAbsent) {
    (void)CheckUnitAbsent(header, payload);
  }
}

}  // namespace
}  // namespace minke::wire

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace minke::wire;
  minke::fuzz::Input input(data, bytes);
  const auto bits = input.Take<uint8_t>();
  FrameHeader header = input.Take<FrameHeader>();
  // Most inputs are to get past the magic number and the length, which the transport fills in.
  if ((bits & 1) == 0) {
    header.magic = kMagic, header.reserved = 0, header.flags = 0;
    header.version = IsHandshakeKind(header.kind) ? kHandshakeVersion : kVersion;
  }
  if ((bits & 2) == 0) header.payload_bytes = static_cast<uint32_t>(input.rest().size());
  std::vector<uint64_t> aligned((input.rest().size() + 7) / 8);
  if (!input.rest().empty()) std::memcpy(aligned.data(), input.rest().data(), input.rest().size());
  const std::span<const std::byte> payload = std::as_bytes(std::span(aligned)).first(input.rest().size());
  CheckHead(header, payload);
  if (!ValidateHeader(header, payload.size()).ok()) return 0;
  FUZZ_ASSERT(header.payload_bytes == payload.size() && payload.size() <= kPayloadBytesMax);
  FUZZ_ASSERT(!ToString(header.kind).empty());
  Touch(payload);
  const RowShape shapes[] = {
      {.hidden = 4, .top_k = 2, .num_experts = 8, .num_groups = 2, .activation_bytes = 2},
      {.hidden = 32, .top_k = 6, .num_experts = 160, .num_groups = 8, .activation_bytes = 4}};
  const RowShape& shape = shapes[(bits >> 2) & 1];
  CheckWork(shape, header, payload);
  (void)ReadDispatch(shape, header, payload);
  CheckPartials(shape, header, payload);
  CheckPlan(shape, header, payload);
  CheckPagesAndUnits(header, payload, bits);
  return 0;
}
