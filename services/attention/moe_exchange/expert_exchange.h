// The attention node's side of one MoE layer: sends a microbatch's rows out to be routed and computed,
// gathers the partial sums, and adds them up. The attention node owns the work until every (row, group) is
// done: whatever is lost on the way (a message, a router, an expert server) is found by a deadline or a
// broken connection and sent again. Routers and expert servers keep no state that matters here. Protocol:
// docs/protocol.md.
//
// Nobody gates twice under one attempt: once a plan is known, what is missing is sent again straight to a
// server that hosts the group, with the planned experts and weights.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/time/time.h"
#include "libs/base/thread_pool.h"
#include "libs/gpu_rows/row_combiner.h"
#include "libs/model/config.h"
#include "libs/telemetry/histogram.h"
#include "libs/telemetry/per_node.h"
#include "libs/transport/transport.h"
#include "libs/wire/messages.h"
#include "services/router/dispatch/work_sender.h"
#include "services/router/gating/gate.h"
#include "services/router/placement/placement_table.h"
#include "services/router/telemetry/route_counters.h"

namespace minke::attention {

struct ExchangeOptions {
  // First deadline of a RoutePlan and of results; doubled at every retry, up to 16 times. Crashed and frozen
  // peers are found sooner, by the transport; these find lost messages.
  absl::Duration plan_timeout = absl::Seconds(2);
  absl::Duration result_timeout = absl::Seconds(5);
  absl::Duration retry_pause = absl::Milliseconds(5);  // before asking again where nobody could take rows
  absl::Duration total_timeout = absl::Seconds(60);    // then the rows' requests fail as unavailable
  // Results that take more than this many times the 99th percentile are asked of another replica too; the
  // first answer counts. 0: never.
  double hedge_factor = 2;
  absl::Duration hedge_min = absl::Milliseconds(20);
};

enum class RowOutcome : uint8_t {
  kOk,
  kRejected,     // non-finite scores or values: only this row's request fails
  kUnavailable,  // nobody could do it in time
};

struct ExchangeCounters {
  uint64_t dispatched_rows = 0, redispatched_rows = 0, plan_retries = 0;
  uint64_t hedged_rows = 0;     // (row, group) pairs asked of a second replica
  uint64_t stale_frames = 0;    // of an unknown step or attempt
  uint64_t duplicate_rows = 0;  // their bit was already set
  uint64_t bad_frames = 0;
  uint64_t router_failovers = 0, expert_failovers = 0;  // peers lost with rows of ours, which went to others
};

// What a traced exchange waited for.
struct ExchangeLeg {
  bool routing = false;  // a router's plan; else an expert server's sums
  NodeId node;
  absl::Time begin, end;  // from sending the rows on their way until the answer was here
  uint32_t rows = 0;      // of the answer
};

// For others to read at any time.
struct ExchangeLatencies {
  using ByServer = telemetry::PerNode<telemetry::Histogram>;
  ByServer dispatch;  // by router: from sending it rows until their plan is here, seconds
  // By expert server: from sending the rows on their way until its sums are here, seconds. What another
  // replica was asked for too counts for the first one.
  ByServer combine;
};

// Engine thread only.
class ExpertExchange {
 public:
  // local_gate: routes here instead of asking a router (--routing=local); null otherwise.
  ExpertExchange(const ModelConfig& config, Precision precision, transport::Transport& transport,
                 ExchangeOptions options, int microbatches_max, router::Gate* local_gate, ThreadPool& pool);
  ~ExpertExchange();

  void SetPlacement(std::shared_ptr<const router::PlacementTable> placement);
  // Latencies and counters of other nodes are dropped.
  void RetainNodes(absl::FunctionRef<bool(NodeId)> kept);
  void SetRouters(std::vector<NodeId> routers) { routers_ = std::move(routers); }
  void OnPeerUp(NodeId peer);
  void OnPeerLost(NodeId peer);
  bool IsUp(NodeId peer) const;
  // RoutePlan, Partial, Nack, Busy, Reject. Anything stale, repeated or malformed is counted and dropped.
  void OnFrame(const transport::FrameRef& frame);
  // Deadlines and retries; cheap when nothing is due.
  void Tick(absl::Time now);

  // Memory for `rows` rows in the message that will carry them, so that Begin needs no copy; null if they
  // take more than one message. Valid until the exchange ends. REQUIRES: the microbatch has none under way.
  std::byte* RowsOfMessage(int microbatch, int64_t rows);
  // Starts the exchange of rows [rows, hidden] Act; they are copied, unless they lie in RowsOfMessage().
  // REQUIRES: the microbatch has none under way.
  void Begin(int microbatch, uint64_t step, int32_t layer, wire::TrafficClass traffic_class,
             const std::byte* x, int64_t rows, absl::Time now);
  // The same with rows on the device of the transport's row memory: they are copied into messages there.
  // REQUIRES: the transport has row memory; the rows are complete.
  void BeginOnDevice(int microbatch, uint64_t step, int32_t layer, wire::TrafficClass traffic_class,
                     const std::byte* x, int64_t rows, absl::Time now);
  // The legs of the exchange that Begin has just started are appended to `legs` until it ends.
  void Trace(int microbatch, std::vector<ExchangeLeg>* legs);
  bool Done(int microbatch) const;
  // x [rows, hidden] f32 += the sum of each row's partials in group order; outcomes [rows]: rows that are not
  // kOk add nothing. Ends the exchange. REQUIRES: Done(microbatch).
  void Combine(int microbatch, float* x, std::span<RowOutcome> outcomes);
  // The same for an exchange that was begun on the device: sums [rows, hidden] f32, there, are written, not
  // added to; 0 for rows that are not kOk.
  void CombineOnDevice(int microbatch, RowCombiner& combiner, float* sums, std::span<RowOutcome> outcomes);

  const ExchangeCounters& counters() const { return counters_; }
  const ExchangeLatencies& latencies() const { return latencies_; }
  // Of rows gated here; null without a local gate.
  router::RouteCounters* route_counters() const { return route_counters_.get(); }

 private:
  struct Slot;
  struct Piece;
  struct Exchange;

  Exchange& BeginPieces(int microbatch, uint64_t step, int32_t layer, wire::TrafficClass traffic_class,
                        int64_t rows, absl::Time now);
  void RoutePiece(Exchange& exchange, Piece& piece, absl::Time now);
  transport::FrameRef RowsFrame(uint32_t rows);
  transport::FrameRef SameRows(const transport::FrameRef& frame);
  router::WorkItem ItemOf(const Piece& piece, uint32_t row, uint64_t groups) const;
  void End(Exchange& exchange);
  Exchange* Find(const wire::FrameHeader& header);
  Piece* FindPiece(Exchange& exchange, uint32_t row);
  void SendDispatch(Exchange& exchange, Piece& piece, absl::Time now);
  void RouteHere(Exchange& exchange, Piece& piece, absl::Time now);
  void CountRoutes(const Exchange& exchange, const Piece& piece);
  void AdoptPlan(Piece& piece, wire::TrafficClass traffic_class, absl::Time now);
  void SendAgain(Exchange& exchange, Piece& piece, absl::Time now);
  void Hedge(Exchange& exchange, Piece& piece);
  void ResultsTook(Exchange& exchange, absl::Duration time);
  void OnRoutePlan(Exchange& exchange, const transport::FrameRef& frame);
  void OnPartial(Exchange& exchange, const transport::FrameRef& frame, bool again);
  void OnNack(Exchange& exchange, const transport::FrameRef& frame);
  void OnReject(Exchange& exchange, const transport::FrameRef& frame);
  void OnBusy(Exchange& exchange, const transport::FrameRef& frame);
  void FailRow(Piece& piece, uint32_t row, RowOutcome outcome);
  wire::FrameHeader ExchangeHeader(const Exchange& exchange, const Piece& piece) const;

  const ModelConfig config_;
  const Precision precision_;
  const wire::RowShape shape_;
  const ExchangeOptions options_;
  transport::Transport& transport_;
  router::Gate* const local_gate_;
  ThreadPool& pool_;
  router::WorkSender sender_;
  std::shared_ptr<const router::PlacementTable>
      placement_;  // shared with the control plane, which replaces it
  std::vector<NodeId> routers_;
  std::vector<NodeId> up_;
  std::vector<transport::FrameRef>
      overtook_;  // partials that came before their plan, while they are looked at
  std::vector<router::GateResult> gate_results_;
  std::vector<std::unique_ptr<Exchange>> exchanges_;  // by microbatch
  absl::Duration slow_[wire::kNumTrafficClasses];     // 99th percentile of what results take, followed
  ExchangeCounters counters_;
  ExchangeLatencies latencies_;
  std::unique_ptr<router::RouteCounters> route_counters_;
  std::vector<NodeId> routed_to_;  // [rows, groups] of one piece
  // Kept for their memory.
  std::vector<transport::RowCopy> copies_;
  std::vector<std::byte> gate_rows_;  // rows of a piece on the device, for the gate
  std::vector<int32_t> partials_begin_;
  std::vector<PartialSum> partials_;
};

}  // namespace minke::attention
