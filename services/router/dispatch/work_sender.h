// Sends rows to the expert servers that host their groups: chooses a replica per group, gathers each server's
// rows into ExpertWork frames, takes credit and posts them. Used by the router for fresh rows, and by the
// attention node for --routing=local and for everything that has to be sent again.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "libs/cluster/row_shape.h"
#include "libs/model/config.h"
#include "libs/transport/transport.h"
#include "libs/wire/messages.h"
#include "services/router/placement/placement_table.h"

namespace minke::router {

// One row and the groups to send it to (bit g: group g). Pointers are borrowed for the call.
struct WorkItem {
  uint32_t row = 0;                   // index in the exchange
  const std::byte* data = nullptr;    // [hidden] Act, in host memory unless on_device
  const uint16_t* experts = nullptr;  // [k] ascending
  const float* weights = nullptr;     // [k]
  uint64_t groups = 0;
  // `data` is in the memory of the device that the transport's row memory is on, complete, and stays as it is
  // during the call. REQUIRES: transport.row_memory() is not null.
  bool on_device = false;
};

// Engine thread only.
class WorkSender {
 public:
  WorkSender(const ModelConfig& config, Precision precision, transport::Transport& transport)
      : config_(config), shape_(RowShapeOf(config, precision)), transport_(transport) {}

  // `exchange` carries origin, step, layer, microbatch, attempt and class. For every item and group of its
  // mask, `assign(item, group, server)` is called once: with NodeId{} if no usable server hosts the group or
  // has credit, in which case nothing was sent for it. Messages with a row on the device have all their rows
  // in the transport's row memory, if a block of it is free; else in host memory, as the others.
  void Send(const PlacementTable& placement, const wire::FrameHeader& exchange,
            std::span<const WorkItem> items, absl::FunctionRef<bool(NodeId)> usable,
            absl::FunctionRef<void(size_t, uint32_t, NodeId)> assign);

 private:
  struct Selected {
    uint32_t item = 0;
    uint64_t groups = 0;  // of it that go in this message
  };
  // A message that is to be sent once copies_ are done: rows [begin, end) of selected_.
  struct Waiting {
    NodeId server;
    transport::FrameRef frame;
    size_t begin = 0, end = 0;
  };
  // Takes credit and fills a message; its rows, if they are in row memory, only once copies_ are done. Empty:
  // no credit, or a failed device.
  transport::FrameRef MakeFrame(NodeId server, const wire::FrameHeader& exchange, Epoch epoch,
                                std::span<const WorkItem> items, std::span<const Selected> selected);
  transport::FrameRef AllocateFrame(uint32_t rows, uint32_t pairs, bool with_device_rows);
  absl::Status GatherToHost(std::span<const WorkItem> items, std::span<const Selected> selected,
                            std::byte* to);

  const ModelConfig config_;
  const wire::RowShape shape_;
  transport::Transport& transport_;
  std::vector<NodeId> servers_;       // of one call, each once
  std::vector<NodeId> group_server_;  // [items, groups]
  std::vector<Selected> selected_;    // of all messages, one behind the other
  std::vector<Waiting> waiting_;
  std::vector<transport::RowCopy> copies_;
};

// Groups of a row's experts as a bit mask.
uint64_t GroupMask(const ModelConfig& config, std::span<const uint16_t> experts);

}  // namespace minke::router
