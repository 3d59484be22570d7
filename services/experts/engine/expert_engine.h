// The expert server's loop: takes ExpertWork from the transport, merges what is queued for one layer into a
// launch (decode before prefill), and answers each message's attention node with its partial sums. In between
// it gives units to other servers.
//
// Threads: Run() is the engine thread; the rest is thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "libs/base/mutex.h"
#include "libs/telemetry/histogram.h"
#include "libs/transport/transport.h"
#include "services/experts/compute/expert_backend.h"
#include "services/experts/shard/unit_exchange.h"

namespace minke::experts {

struct ExpertEngineOptions {
  // Rows of one launch. Prefill launches are cut short, so that decode rows arriving meanwhile wait a few
  // milliseconds at most.
  int64_t decode_rows_max = 4096;
  int64_t prefill_rows_max = 512;
  UnitExchangeOptions exchange;
  // Rows queued; beyond it messages are dropped (a peer within its credit never gets there).
  int64_t queued_rows_max = 1 << 20;
};

struct ExpertEngineStatus {
  uint64_t launches = 0, rows = 0, nacked_rows = 0, rejected_rows = 0, bad_frames = 0, dropped_frames = 0;
  int64_t queued_rows = 0;
};

// What the engine thread counts for others to read at any time.
struct ExpertEngineCounters {
  explicit ExpertEngineCounters(const ModelConfig& config);
  // (row, group) sums computed of the unit.
  std::atomic<uint64_t>& UnitRows(UnitId unit) const { return unit_rows[unit.layer * groups + unit.group]; }

  const size_t groups;
  const std::unique_ptr<std::atomic<uint64_t>[]> unit_rows;  // [layers, groups]
  // Of launches, by traffic class.
  std::unique_ptr<telemetry::Histogram> launch_rows[wire::kNumTrafficClasses],
      launch_seconds[wire::kNumTrafficClasses];
  std::atomic<int64_t> busy_ns{0}, idle_ns{0};  // in launches; waiting for work
};

class ExpertEngine {
 public:
  // `backend` must outlive the engine; its Run is the engine thread's.
  ExpertEngine(const ModelConfig& config, Precision precision,
               std::unique_ptr<transport::Transport> transport, ExpertBackend& backend,
               ExpertEngineOptions options);
  ~ExpertEngine();

  void AddUnit(UnitId unit, std::shared_ptr<const UnitWeights> weights);
  // Takes effect when no message of the unit's layer is queued; later rows are answered with a Nack.
  void RemoveUnit(UnitId unit);
  // What the engine let go of, for a thread that has time to free it.
  std::vector<std::shared_ptr<const UnitWeights>> TakeRemoved();
  void SetEpoch(Epoch epoch);  // newest placement this server knows of; named in Nacks

  // For the loader's thread.
  UnitExchange& exchange() { return exchange_; }

  void Run();  // until Stop()
  void Stop();
  ExpertEngineStatus status() const;
  const ExpertEngineCounters& counters() const { return live_counters_; }
  const transport::Transport& transport() const { return *transport_; }  // its statistics are for any thread

 private:
  struct Job {
    transport::FrameRef frame;
    NodeId from;  // whose credit it holds
    wire::WorkView view;
  };
  struct Reply {  // a Partial on its way
    transport::FrameRef frame;
    size_t job, begin, end;  // group rows of the launch
  };
  // Looks for news; with `publish`, also shows others the counters.
  void TakeMail(bool publish);
  void PollTransport();
  void Accept(transport::Event& event);
  bool RunLaunch();
  void Answer(std::span<const Job> jobs);
  bool Queued(uint32_t layer) const;
  // For `rows` sums: in row memory if there is a free block, else in host memory.
  transport::FrameRef PartialFrame(uint32_t rows);
  void SendWithout(std::span<const GroupRow> rejected, const Reply& reply, const Job& job);
  transport::FrameRef RowListFrame(const wire::FrameHeader& request, wire::Kind kind,
                                   std::span<const GroupRow> rows, const wire::WorkView& view);

  const ModelConfig config_;
  const wire::RowShape shape_;
  const ExpertEngineOptions options_;
  std::unique_ptr<transport::Transport> transport_;
  ExpertBackend& backend_;
  UnitExchange exchange_;
  Units units_;
  std::vector<UnitId> removing_;
  Epoch epoch_;
  std::vector<Job> queues_[wire::kNumTrafficClasses];  // oldest first
  std::vector<Job> jobs_;
  // Of the launch, kept for their memory.
  std::vector<LaunchJob> launch_;
  std::vector<GroupRow> hosted_;
  std::vector<SumTarget> sums_;  // of hosted_, in the messages that carry them
  std::vector<uint8_t> finite_;  // of hosted_
  std::vector<Reply> replies_;
  ExpertEngineStatus counters_;
  ExpertEngineCounters live_counters_;

  mutable Mutex mutex_;
  std::vector<std::pair<UnitId, std::shared_ptr<const UnitWeights>>> new_units_ ABSL_GUARDED_BY(mutex_);
  std::vector<UnitId> to_remove_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<const UnitWeights>> removed_ ABSL_GUARDED_BY(mutex_);
  Epoch new_epoch_ ABSL_GUARDED_BY(mutex_);
  ExpertEngineStatus status_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> has_mail_{false};  // so that looking takes no lock
  std::atomic<bool> stop_{false};
};

}  // namespace minke::experts
