// The router's data plane: gates the rows of each Dispatch, tells the attention node the plan, and sends the
// rows on to the expert servers. Keeps nothing of a request.
//
// Threads: Run() is the engine thread; the rest is thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "libs/base/mutex.h"
#include "libs/cluster/peer_keeper.h"
#include "services/router/dispatch/work_sender.h"
#include "services/router/gating/gate.h"
#include "services/router/placement/placement_table.h"
#include "services/router/telemetry/route_counters.h"

namespace minke::router {

struct RouterStatus {
  uint64_t dispatches = 0, rows = 0, rejected_rows = 0, unplaced_rows = 0, bad_frames = 0;
  bool connected = false;    // to an expert server for every unit of the placement
  std::vector<NodeId> lost;  // expert servers that have not answered for a second
};

class RouterEngine {
 public:
  RouterEngine(std::unique_ptr<Gate> gate, Precision precision,
               std::unique_ptr<transport::Transport> transport, ThreadPool& pool);
  ~RouterEngine();

  // Expert servers by data-plane address, and where the units are.
  void UpdateCluster(std::map<NodeId, std::string> experts, std::shared_ptr<const PlacementTable> placement);

  void Run();  // until Stop()
  void Stop();
  RouterStatus status() const;
  RouteCounters& counters() { return route_counters_; }
  const RouteCounters& counters() const { return route_counters_; }
  const transport::Transport& transport() const { return *transport_; }  // its statistics are for any thread
  std::vector<int32_t> moe_layers() const { return moe_layers_; }

 private:
  // Looks for news; with `publish`, also shows others the counters.
  void TakeMail(bool publish);
  void OnDispatch(NodeId from, const transport::FrameRef& frame);
  // Gates the message's rows, wherever they are, into the scratch below. `data`: as ReadDispatch gave it.
  absl::Status RouteRows(const transport::FrameRef& frame, const std::byte* data);

  const std::unique_ptr<Gate> gate_;
  const ModelConfig config_;
  const wire::RowShape shape_;
  const std::vector<int32_t> moe_layers_;
  std::unique_ptr<transport::Transport> transport_;
  ThreadPool& pool_;
  WorkSender sender_;
  cluster::PeerKeeper peers_;
  std::shared_ptr<const PlacementTable> placement_;  // shared with the control plane, which replaces it
  std::map<NodeId, std::string> experts_;
  RouterStatus counters_;
  bool reach_changed_ = true;  // since counters_.connected was found: it looks at every unit
  std::vector<uint16_t> experts_scratch_;
  std::vector<float> weights_scratch_;
  std::vector<GateResult> results_;
  std::vector<std::byte> rows_scratch_;  // rows that lie in row memory, for a gate that takes none there
  std::vector<WorkItem> items_;
  std::vector<NodeId> assigned_;  // [rows, groups]
  std::vector<NodeId> servers_;   // of one plan

  RouteCounters route_counters_;

  mutable Mutex mutex_;
  bool updated_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<NodeId, std::string> new_experts_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<const PlacementTable> new_placement_ ABSL_GUARDED_BY(mutex_);
  RouterStatus status_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> has_mail_{false};  // so that looking takes no lock
  std::atomic<bool> stop_{false};
};

}  // namespace minke::router
