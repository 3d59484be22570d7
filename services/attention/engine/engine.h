// The attention node's step loop: takes submissions, plans a step, drives its microbatches through all layers
// (computing attention here, exchanging rows with the expert pool), samples, and hands out events.
//
// Threads: Run() is the engine thread and owns model scratch, cache, scheduler, exchange and transport.
// Everything else is thread-safe and only posts to the engine's mailbox.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "libs/base/mutex.h"
#include "libs/cluster/peer_keeper.h"
#include "libs/telemetry/histogram.h"
#include "services/attention/engine/sequence_trace.h"
#include "services/attention/engine/step_profile.h"
#include "services/attention/latent_cache/page_exchange.h"
#include "services/attention/latent_cache/page_pool.h"
#include "services/attention/layers/attention_model.h"
#include "services/attention/moe_exchange/expert_exchange.h"
#include "services/attention/scheduler/scheduler.h"

namespace minke::attention {

struct EngineOptions {
  SchedulerLimits limits;
  int64_t cache_bytes = int64_t{1} << 30;  // of the latent cache; untouched memory costs nothing
  int microbatches = 0;                    // 0: auto, 1 or 2 by step
  ExchangeOptions exchange;
  PageExchangeOptions page_exchange;  // not without limits.reuse_prefixes
  std::string trace_file;             // of the first trace_steps steps; empty: none
  int64_t trace_steps = 200;
  int64_t mailbox_max = 4096;         // submissions not yet seen by the engine
  tracing::Tracer* tracer = nullptr;  // of traced requests; null: none are traced here
};

// The most microbatches a step of this engine has.
int MicrobatchesMax(const EngineOptions& options);

// The part of the cluster this node talks to.
struct ClusterSnapshot {
  std::map<NodeId, std::string> routers, experts, attention;  // data-plane addresses
  bool experts_elsewhere = false;                             // some expert server is on another host
  std::shared_ptr<const router::PlacementTable> placement;    // shared with other readers of the same view
};

struct EngineOutput {
  std::vector<RequestEvent> events;
  std::vector<PrefixChange> prefixes;  // in order
};

struct EngineStatus {
  int64_t running = 0, waiting = 0;  // those whose pages are being fetched wait
  int64_t pages_total = 0, pages_used = 0, pages_cached = 0;
  uint64_t split_steps = 0;  // in more than one microbatch
  uint64_t steps = 0, preemptions = 0, redispatched_rows = 0, hedged_rows = 0, stale_frames = 0,
           duplicate_rows = 0, bad_frames = 0;
  uint64_t generated_tokens = 0, prompt_tokens = 0;
  uint64_t computed_tokens = 0;                 // rows of all steps
  uint64_t reuse_queries = 0, reuse_hits = 0;   // prompt tokens looked up in, and taken from, earlier pages
  uint64_t pages_fetched = 0, pages_given = 0;  // from and to other nodes
  uint64_t fetches_failed = 0;                  // of a sequence's pages, in part at least
  int64_t giving = 0;                           // nodes' fetches that are under way from here
  std::array<double, kStepPhases> phase_seconds{};
  bool connected = false;  // to a router (if one is needed) and a server of every unit
  int64_t page_bytes = 0;  // of one page of the latent cache, through all layers
  uint64_t dispatched_rows = 0, plan_retries = 0, router_failovers = 0,
           expert_failovers = 0;  // ExchangeCounters
};

// What a step computed.
enum class StepKind : uint8_t { kDecode, kPrefill, kMixed };
inline constexpr int kStepKinds = 3;
std::string_view ToString(StepKind kind);

// Of steps; any thread may read.
struct StepHistograms {
  StepHistograms();
  std::unique_ptr<telemetry::Histogram> seconds[kStepKinds], rows;
};

class Engine {
 public:
  // Called on the engine thread at the end of a step, with the events of all requests it touched and what
  // became or ceased to be reusable.
  using OutputSink = std::function<void(EngineOutput)>;

  // local_gate: --routing=local. allowed_tokens [vocab] 0/1: ids that may be sampled; empty: all.
  Engine(std::unique_ptr<AttentionModel> model, std::unique_ptr<transport::Transport> transport,
         std::unique_ptr<router::Gate> local_gate, ThreadPool& pool, EngineOptions options,
         std::vector<uint8_t> allowed_tokens, OutputSink sink);
  ~Engine();

  // RESOURCE_EXHAUSTED when the mailbox is full. Every accepted request ends with an event that has a finish
  // reason, unless it is cancelled.
  absl::Status Submit(Request request);
  void Cancel(const RequestKey& key);
  void CancelSession(uint64_t session);
  void UpdateCluster(ClusterSnapshot snapshot);

  void Run();   // until Stop()
  void Stop();  // any thread
  EngineStatus status() const;
  // The rest of what it counts; thread-safe.
  const StepHistograms& step_histograms() const { return step_histograms_; }
  const ExchangeLatencies& exchange_latencies() const { return exchange_.latencies(); }
  router::RouteCounters* route_counters() const { return exchange_.route_counters(); }  // null: no local gate
  const transport::Transport& transport() const { return *transport_; }  // its statistics are for any thread
  const ModelConfig& config() const { return model_->config(); }

 private:
  enum class Phase { kCompute, kExchange, kDone };
  struct Lane {  // one microbatch on its way
    Microbatch batch;
    std::vector<StepChunk> chunks;     // in the order of batch.chunks
    int64_t rows_planned = 0;          // of `chunks`
    std::vector<std::byte> rows;       // [rows, hidden] Act, where they do not fit one message
    std::vector<RowOutcome> outcomes;  // worst so far, by row
    Phase phase = Phase::kDone;
    int32_t layer = 0;
    wire::TrafficClass traffic_class{};
    SequenceTrace* trace = nullptr;  // of a request for which this step is traced
    tracing::SpanContext step_span;  // its parts' parent
    absl::Time exchange_begin;
    std::vector<ExchangeLeg> legs;
  };
  // A row whose logits are wanted, why, and what came of it.
  struct OutputRow {
    int32_t row;  // in the microbatch
    size_t chunk;
    std::optional<uint32_t>
        prompt_token;    // set: log-probability of this next prompt token; unset: a new token
    bool drawn = false;  // `token` is there
    uint32_t token = 0;
    TokenLogprobs logprobs;
  };
  struct Command;

  void TakeMail();
  void Admit(Request request, std::vector<RequestEvent>& refused);
  void ExchangePages();
  void ConnectToPeers();
  void PollTransport();
  void ApplyCluster();
  void RunStep(std::vector<StepChunk> chunks);
  int64_t MicrobatchesFor(const std::vector<StepChunk>& chunks) const;
  void FillLanes(const std::vector<StepChunk>& chunks);
  void TraceStep();
  void RecordExchange(Lane& lane);
  void Advance(Lane& lane, int index);
  absl::Time BeginExchange(Lane& lane, int index);
  void FinishExchange(Lane& lane, int index);
  void ComputeLanes();
  void ComputeWhole(WholeSteps& whole, Lane& lane);
  void PlanOutputs(const Lane& lane);
  void DrawOnHost(const Lane& lane);
  void LogEnd(const Sequence& sequence, const RequestEvent& event) const;
  void CollectOutputs(Lane& lane, std::vector<RequestEvent>& events);
  void Emit(std::vector<RequestEvent> events);
  void PublishStatus();
  bool Connected() const;

  const EngineOptions options_;
  std::unique_ptr<AttentionModel> model_;
  std::unique_ptr<transport::Transport> transport_;
  std::unique_ptr<router::Gate> local_gate_;
  ThreadPool& pool_;
  const std::vector<uint8_t> allowed_tokens_;
  const OutputSink sink_;

  PagePool pages_;
  Scheduler scheduler_;
  ExpertExchange exchange_;
  PageExchange page_exchange_;
  cluster::PeerKeeper peers_;
  std::vector<Lane> lanes_;
  std::vector<OutputRow> outputs_;             // of the lane whose outputs are being collected
  std::vector<StepChunk> order_;               // of FillLanes
  std::vector<RowOutcome> exchange_outcomes_;  // of one layer
  uint64_t step_ = 0, split_steps_ = 0;
  uint64_t generated_tokens_ = 0, prompt_tokens_ = 0, computed_tokens_ = 0;
  StepProfile profile_;
  std::array<double, kStepPhases> step_seconds_{}, accounted_{};  // of the last step; of all of them
  StepHistograms step_histograms_;
  kernels::Scratch<float> logits_;
  ClusterSnapshot cluster_;
  bool reach_changed_ = true, connected_ = false;  // connected_: as of the last change

  mutable Mutex mutex_;
  std::vector<Command> mail_ ABSL_GUARDED_BY(mutex_);
  EngineStatus status_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> has_mail_{false};  // so that looking takes no lock
  std::atomic<bool> stop_{false};
};

}  // namespace minke::attention
