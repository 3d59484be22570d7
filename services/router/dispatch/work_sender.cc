#include "services/router/dispatch/work_sender.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "libs/base/status.h"

namespace minke::router {

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
  std::array<NodeId, 64> server_of_group{};
  for (uint64_t rest = wanted; rest != 0; rest &= rest - 1) {
    const uint32_t group = std::countr_zero(rest);
    server_of_group[group] = placement.Choose({exchange.layer, group}, usable).value_or(NodeId{});
  }
  const size_t rows_max = MessageRowsMax(shape_);
  for (uint64_t rest = wanted; rest != 0;) {
    const NodeId server = server_of_group[std::countr_zero(rest)];
    uint64_t server_groups = 0;
    for (uint64_t g = rest; g != 0; g &= g - 1) {
      if (server_of_group[std::countr_zero(g)] == server) server_groups |= g & -g;
    }
    rest &= ~server_groups;
    const auto flush = [&] {
      if (selected_.empty()) return;
      const bool sent = server != NodeId{} &&
                        SendFrame(server, server_groups, exchange, placement.epoch(), items, selected_);
      for (const uint32_t index : selected_) {
        for (uint64_t g = items[index].groups & server_groups; g != 0; g &= g - 1) {
          assign(index, std::countr_zero(g), sent ? server : NodeId{});
        }
      }
      selected_.clear();
    };
    for (uint32_t i = 0; i < items.size(); ++i) {
      if ((items[i].groups & server_groups) == 0) continue;
      selected_.push_back(i);
      if (selected_.size() == rows_max) flush();
    }
    flush();
  }
}

bool WorkSender::SendFrame(NodeId server, uint64_t server_groups, const wire::FrameHeader& exchange,
                           Epoch epoch, std::span<const WorkItem> items, std::span<const uint32_t> selected) {
  const uint32_t rows = static_cast<uint32_t>(selected.size());
  if (!transport_.TakeCredit(server, exchange.traffic_class, rows)) return false;
  const auto goes = [&](const WorkItem& item, uint16_t expert) {
    return (item.groups & server_groups) >> config_.GroupOfExpert(expert) & 1;
  };
  uint32_t pairs = 0;
  for (const uint32_t index : selected) {
    for (int32_t i = 0; i < shape_.top_k; ++i) pairs += goes(items[index], items[index].experts[i]);
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
    const WorkItem& item = items[selected[i]];
    const uint32_t begin = next_pair;
    for (int32_t e = 0; e < shape_.top_k; ++e) {
      if (goes(item, item.experts[e])) out.pairs[next_pair++] = {item.weights[e], item.experts[e], 0};
    }
    out.rows[i].row = item.row;
    out.rows[i].set_pairs(begin, next_pair - begin);
    std::memcpy(out.data + i * shape_.row_bytes(), item.data, shape_.row_bytes());
  }
  return transport_.Send(server, std::move(frame)).ok();
}

}  // namespace minke::router
