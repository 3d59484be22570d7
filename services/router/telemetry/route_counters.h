// What is counted where rows are gated and sent: by the router, and by an attention node with
// --routing=local. One thread, the engine, counts; others read at any time. Counting is relaxed atomics of a
// fixed size per server.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "libs/base/mutex.h"
#include "libs/model/config.h"
#include "libs/telemetry/histogram.h"
#include "libs/telemetry/page.h"
#include "libs/telemetry/per_node.h"
#include "services/router/gating/gate.h"
#include "services/router/placement/placement_table.h"
#include "services/router/telemetry/balance.h"

namespace minke::router {

class RouteCounters {
 public:
  // Balance is that of the last 25 to 30 s.
  static constexpr absl::Duration kWindowPart = absl::Seconds(5);
  static constexpr size_t kWindowParts = 6;

  explicit RouteCounters(const ModelConfig& config);

  // Rows of one exchange that were gated and then sent. Engine thread only.
  //   experts [rows, k]; results [rows], rejected rows count nowhere; scores [rows, experts] softmax
  //   servers [rows, groups]: who got the row for the group; none: nobody, or no expert of it was chosen
  // REQUIRES: `layer` is one with experts.
  void Count(int32_t layer, int64_t rows, const uint16_t* experts, const GateResult* results,
             const float* scores, std::span<const NodeId> servers);
  // Drops the counters of servers that are not `kept`. Engine thread only.
  void RetainServers(absl::FunctionRef<bool(NodeId)> kept) { servers_.Retain(kept); }

  // The rest: any thread.
  void SetPlacement(std::shared_ptr<const PlacementTable> placement);
  // Moves the window on; to be called at least once a second.
  void Tick(absl::Time now);
  void Collect(telemetry::Page& page) const;
  // Rows each expert was chosen for since the start, [moe layer index][expert].
  std::vector<std::vector<uint64_t>> Selections() const;
  // (row, group) pairs since the start, [moe layer index, group].
  std::vector<uint64_t> UnitRows() const;
  // Of the window; no rows yet: nothing of that layer. [moe layer index]
  std::vector<std::optional<LayerBalance>> Balance() const;

 private:
  using Counter = std::atomic<uint64_t>;
  struct PerServer {
    explicit PerServer(size_t layers, size_t groups)
        : rows(new Counter[layers]()), pairs(new Counter[layers * groups]()) {}
    std::unique_ptr<Counter[]> rows;   // [layers] each row once
    std::unique_ptr<Counter[]> pairs;  // [layers, groups] (row, expert) pairs
  };
  // Only the engine thread writes.
  static void Add(Counter& counter, uint64_t n) {
    counter.store(counter.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }
  std::vector<LayerLoad> Load() const;
  int64_t ServersOf(uint32_t layer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ModelConfig config_;
  const std::vector<int32_t> layers_;
  const size_t experts_, groups_;
  std::vector<int32_t> index_of_layer_;
  std::unique_ptr<Counter[]> rows_;                             // [layers]
  std::unique_ptr<Counter[]> selections_;                       // [layers, experts]
  std::unique_ptr<Counter[]> unit_rows_;                        // [layers, groups]
  std::unique_ptr<std::atomic<double>[]> scores_;               // [layers, experts]
  std::vector<std::unique_ptr<telemetry::Histogram>> fan_out_;  // by layer
  Counter fan_out_violations_{0};
  telemetry::PerNode<PerServer> servers_;
  std::vector<double> score_sums_;  // of one call

  mutable Mutex mutex_;
  std::shared_ptr<const PlacementTable> placement_ ABSL_GUARDED_BY(mutex_);  // shared with the engine
  struct Part {
    absl::Time at;
    std::vector<LayerLoad> loads;
  };
  std::deque<Part> window_ ABSL_GUARDED_BY(mutex_);  // oldest first
};

}  // namespace minke::router
