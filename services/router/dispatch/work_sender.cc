#include "services/router/dispatch/work_sender.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::router {

using transport::FrameRef;

namespace {

// Shares rows out evenly, however few neighbours they are.
float Draw(uint32_t row) {
  constexpr uint32_t kGolden = 0x9e3779b9;
  return static_cast<float>((row + 1) * kGolden >> 8) * 0x1p-24f;
}

}  // namespace

uint64_t GroupMask(const ModelConfig& config, std::span<const uint16_t> experts) {
  uint64_t mask = 0;
  for (const uint16_t expert : experts) mask |= uint64_t{1} << config.GroupOfExpert(expert);
  return mask;
}

void WorkSender::Send(const PlacementTable& placement, const wire::FrameHeader& exchange,
                      std::span<const WorkItem> items, absl::FunctionRef<bool(NodeId)> usable,
                      absl::FunctionRef<void(size_t, uint32_t, NodeId)> assign) {
  uint64_t wanted = 0;
  for (const WorkItem& item : items) wanted |= item.groups;
  servers_.clear();
  const size_t groups = shape_.num_groups;
  group_server_.assign(items.size() * groups, NodeId{});
  for (uint64_t rest = wanted; rest != 0; rest &= rest - 1) {
    const uint32_t group = std::countr_zero(rest);
    const UnitId unit{exchange.layer, group};
    const bool split = placement.Split(unit);
    NodeId server{};
    for (size_t i = 0, seen = 0; i < items.size(); ++i) {
      if ((items[i].groups >> group & 1) == 0) continue;
      if (seen++ == 0 || split)
        server = placement.Choose(unit, Draw(items[i].row), usable).value_or(NodeId{});
      group_server_[i * groups + group] = server;
      if (std::find(servers_.begin(), servers_.end(), server) == servers_.end()) servers_.push_back(server);
    }
  }
  const auto assign_all = [&](std::span<const Selected> rows, NodeId server) {
    for (const Selected& row : rows) {
      for (uint64_t g = row.groups; g != 0; g &= g - 1) assign(row.item, std::countr_zero(g), server);
    }
  };
  selected_.clear();
  const size_t rows_max = MessageRowsMax(shape_);
  for (const NodeId server : servers_) {
    size_t begin = selected_.size();  // of what is not in a message yet
    const auto flush = [&] {
      if (begin == selected_.size()) return;
      const std::span<const Selected> rows = std::span(selected_).subspan(begin);
      FrameRef frame;
      if (server != NodeId{}) frame = MakeFrame(server, exchange, placement.epoch(), items, rows);
      if (frame && frame.device_rows() != nullptr) {
        waiting_.push_back({server, std::move(frame), begin, selected_.size()});
      } else {
        const bool sent = frame && transport_.Send(server, std::move(frame)).ok();
        assign_all(rows, sent ? server : NodeId{});
      }
      begin = selected_.size();
    };
    for (uint32_t i = 0; i < items.size(); ++i) {
      uint64_t here = 0;
      for (uint64_t g = items[i].groups; g != 0; g &= g - 1) {
        if (group_server_[i * groups + std::countr_zero(g)] == server) here |= g & -g;
      }
      if (here == 0) continue;
      selected_.push_back({i, here});
      if (selected_.size() - begin == rows_max) flush();
    }
    flush();
  }
  if (waiting_.empty()) return;
  // One copy for all messages: each costs a wait for the device.
  const absl::Status gathered = transport_.row_memory()->CopyRows(copies_);
  if (!gathered.ok()) log::Error("dispatch", StrCat("rows on the device: ", gathered.message()));
  for (Waiting& waiting : waiting_) {
    const bool sent = gathered.ok() && transport_.Send(waiting.server, std::move(waiting.frame)).ok();
    assign_all(std::span(selected_).subspan(waiting.begin, waiting.end - waiting.begin),
               sent ? waiting.server : NodeId{});
  }
  waiting_.clear();
  copies_.clear();
}

FrameRef WorkSender::AllocateFrame(uint32_t rows, uint32_t pairs, bool with_device_rows) {
  const uint32_t payload_bytes = wire::WorkPayloadBytes(shape_, rows, pairs);
  const uint64_t row_bytes = rows * static_cast<uint64_t>(shape_.row_bytes());
  transport::RowMemory* const memory = with_device_rows ? transport_.row_memory() : nullptr;
  if (memory != nullptr && memory->Fits(rows, row_bytes)) {
    const auto offset = static_cast<uint32_t>(payload_bytes - row_bytes);
    if (FrameRef frame = transport_.frames().AllocateWithRows(payload_bytes, offset, *memory)) return frame;
  }
  return transport_.frames().Allocate(payload_bytes);
}

absl::Status WorkSender::GatherToHost(std::span<const WorkItem> items, std::span<const Selected> selected,
                                      std::byte* to) {
  const int64_t row_bytes = shape_.row_bytes();
  for (size_t i = 0; i < selected.size();) {
    const WorkItem& first = items[selected[i].item];
    if (!first.on_device) {
      std::memcpy(to + i++ * row_bytes, first.data, row_bytes);
      continue;
    }
    // Rows that lie one behind the other cost one wait.
    size_t end = i + 1;
    while (end < selected.size() && items[selected[end].item].on_device &&
           items[selected[end].item].data == first.data + (end - i) * row_bytes)
      ++end;
    MK_RETURN_IF_ERROR(
        transport_.row_memory()->CopyToHost(to + i * row_bytes, first.data, (end - i) * row_bytes));
    i = end;
  }
  return absl::OkStatus();
}

FrameRef WorkSender::MakeFrame(NodeId server, const wire::FrameHeader& exchange, Epoch epoch,
                               std::span<const WorkItem> items, std::span<const Selected> selected) {
  const uint32_t rows = static_cast<uint32_t>(selected.size());
  if (!transport_.TakeCredit(server, exchange.traffic_class, rows)) return FrameRef();
  const auto goes = [&](const Selected& row, uint16_t expert) {
    return row.groups >> config_.GroupOfExpert(expert) & 1;
  };
  uint32_t pairs = 0;
  bool on_device = false;
  for (const Selected& row : selected) {
    on_device |= items[row.item].on_device;
    for (int32_t i = 0; i < shape_.top_k; ++i) pairs += goes(row, items[row.item].experts[i]);
  }
  FrameRef frame = AllocateFrame(rows, pairs, on_device);
  wire::FrameHeader& header = frame.header();
  const uint32_t payload_bytes = header.payload_bytes;
  header = exchange;
  header.kind = wire::Kind::kExpertWork;
  header.set_epoch(epoch);
  header.rows = rows;
  header.pairs = pairs;
  header.payload_bytes = payload_bytes;
  header.flags = 0;
  header.row_begin = 0;
  const wire::WorkSpans out = wire::LayOutWork(shape_, rows, pairs, frame.payload_span());
  uint32_t next_pair = 0;
  for (uint32_t i = 0; i < rows; ++i) {
    const WorkItem& item = items[selected[i].item];
    const uint32_t begin = next_pair;
    for (int32_t e = 0; e < shape_.top_k; ++e) {
      if (goes(selected[i], item.experts[e])) out.pairs[next_pair++] = {item.weights[e], item.experts[e], 0};
    }
    out.rows[i].row = item.row;
    out.rows[i].set_pairs(begin, next_pair - begin);
    if (frame.device_rows() != nullptr)
      copies_.push_back({frame.device_rows() + i * shape_.row_bytes(), item.data, !item.on_device});
  }
  if (frame.device_rows() != nullptr) return frame;
  if (const absl::Status gathered = GatherToHost(items, selected, out.data); !gathered.ok()) {
    log::Error("dispatch", StrCat("rows on the device: ", gathered.message()));
    return FrameRef();
  }
  return frame;
}

}  // namespace minke::router
