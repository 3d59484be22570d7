#include "services/router/dispatch/work_sender.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "libs/base/status.h"

namespace minke::router {
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
  const size_t rows_max = MessageRowsMax(shape_);
  for (const NodeId server : servers_) {
    const auto flush = [&] {
      if (selected_.empty()) return;
      const bool sent =
          server != NodeId{} && SendFrame(server, exchange, placement.epoch(), items, selected_);
      for (const Selected& row : selected_) {
        for (uint64_t g = row.groups; g != 0; g &= g - 1) {
          assign(row.item, std::countr_zero(g), sent ? server : NodeId{});
        }
      }
      selected_.clear();
    };
    for (uint32_t i = 0; i < items.size(); ++i) {
      uint64_t here = 0;
      for (uint64_t g = items[i].groups; g != 0; g &= g - 1) {
        if (group_server_[i * groups + std::countr_zero(g)] == server) here |= g & -g;
      }
      if (here == 0) continue;
      selected_.push_back({i, here});
      if (selected_.size() == rows_max) flush();
    }
    flush();
  }
}

bool WorkSender::SendFrame(NodeId server, const wire::FrameHeader& exchange, Epoch epoch,
                           std::span<const WorkItem> items, std::span<const Selected> selected) {
  const uint32_t rows = static_cast<uint32_t>(selected.size());
  if (!transport_.TakeCredit(server, exchange.traffic_class, rows)) return false;
  const auto goes = [&](const Selected& row, uint16_t expert) {
    return row.groups >> config_.GroupOfExpert(expert) & 1;
  };
  uint32_t pairs = 0;
  for (const Selected& row : selected) {
    for (int32_t i = 0; i < shape_.top_k; ++i) pairs += goes(row, items[row.item].experts[i]);
  }
  transport::FrameRef frame = transport_.frames().Allocate(wire::WorkPayloadBytes(shape_, rows, pairs));
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
    std::memcpy(out.data + i * shape_.row_bytes(), item.data, shape_.row_bytes());
  }
  return transport_.Send(server, std::move(frame)).ok();
}

}  // namespace minke::router
