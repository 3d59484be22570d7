#include "services/experts/engine/expert_engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/cluster/row_shape.h"

namespace minke::experts {

using transport::FrameRef;

namespace {

constexpr absl::Duration kIdleWait = absl::Milliseconds(100);
// Others see the counters this late at most while the engine is busy.
constexpr absl::Duration kStatusPeriod = absl::Milliseconds(20);
// Decode launches take up to 4,096 rows.
std::vector<double> LaunchRowsBuckets() { return {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096}; }

using Clock = std::chrono::steady_clock;
int64_t NsSince(Clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
}

// The request's exchange, as a reply names it.
void FillReply(const wire::FrameHeader& request, wire::Kind kind, uint32_t rows, Epoch epoch,
               FrameRef& frame) {
  wire::FrameHeader& header = frame.header();
  const uint32_t payload_bytes = header.payload_bytes;
  header = request;
  header.kind = kind;
  header.flags = 0;
  header.pairs = 0;
  header.row_begin = 0;
  header.rows = rows;
  header.payload_bytes = payload_bytes;
  header.set_epoch(epoch);
}

}  // namespace

ExpertEngineCounters::ExpertEngineCounters(const ModelConfig& config)
    : groups(config.n_routed_experts > 0 ? config.placement_groups() : 0),
      unit_rows(new std::atomic<uint64_t>[config.num_hidden_layers * groups]()) {
  for (auto& histogram : launch_rows) histogram = std::make_unique<telemetry::Histogram>(LaunchRowsBuckets());
  for (auto& histogram : launch_seconds)
    histogram = std::make_unique<telemetry::Histogram>(telemetry::StepSecondsBuckets());
}

ExpertEngine::ExpertEngine(const ModelConfig& config, Precision precision,
                           std::unique_ptr<transport::Transport> transport, ExpertBackend& backend,
                           ExpertEngineOptions options)
    : config_(config),
      shape_(RowShapeOf(config, precision)),
      options_(options),
      transport_(std::move(transport)),
      backend_(backend),
      exchange_(options.exchange, *transport_),
      live_counters_(config) {}

ExpertEngine::~ExpertEngine() = default;

void ExpertEngine::AddUnit(UnitId unit, std::shared_ptr<const UnitWeights> weights) {
  {
    const MutexLock lock(mutex_);
    new_units_.emplace_back(unit, std::move(weights));
    has_mail_.store(true);
  }
  transport_->Wake();
}

void ExpertEngine::RemoveUnit(UnitId unit) {
  const MutexLock lock(mutex_);
  to_remove_.push_back(unit);
  has_mail_.store(true);
}

std::vector<std::shared_ptr<const UnitWeights>> ExpertEngine::TakeRemoved() {
  const MutexLock lock(mutex_);
  return std::exchange(removed_, {});
}

void ExpertEngine::SetEpoch(Epoch epoch) {
  const MutexLock lock(mutex_);
  new_epoch_ = epoch;
  has_mail_.store(true);
}

void ExpertEngine::Stop() {
  exchange_.Stop();
  stop_.store(true);
  transport_->Wake();
}

ExpertEngineStatus ExpertEngine::status() const {
  const MutexLock lock(mutex_);
  return status_;
}

void ExpertEngine::TakeMail(bool publish) {
  if (!publish && !has_mail_.load()) return;
  const MutexLock lock(mutex_);
  has_mail_.store(false);
  removing_.insert(removing_.end(), to_remove_.begin(), to_remove_.end());
  to_remove_.clear();
  for (auto& [unit, weights] : new_units_) {
    units_[unit] = std::move(weights);
    std::erase(removing_, unit);
  }
  new_units_.clear();
  std::erase_if(removing_, [&](UnitId unit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (Queued(unit.layer)) return false;
    if (const auto it = units_.find(unit); it != units_.end()) {
      removed_.push_back(std::move(it->second));
      units_.erase(it);
    }
    return true;
  });
  epoch_ = new_epoch_;
  status_ = counters_;
}

bool ExpertEngine::Queued(uint32_t layer) const {
  for (const std::vector<Job>& queue : queues_) {
    for (const Job& job : queue) {
      if (job.frame.header().layer == layer) return true;
    }
  }
  return false;
}

void ExpertEngine::Accept(transport::Event& event) {
  const wire::FrameHeader& header = event.frame.header();
  absl::StatusOr<wire::WorkView> view = header.kind == wire::Kind::kExpertWork
                                            ? wire::ReadWork(shape_, header, event.frame.payload_span())
                                            : absl::InvalidArgumentError("not ExpertWork");
  if (view.ok() && !(header.layer < config_.num_hidden_layers && config_.IsMoeLayer(header.layer))) {
    view = absl::InvalidArgumentError(StrCat("layer ", header.layer, " has no experts"));
  }
  if (view.ok() && event.frame.device_rows() != nullptr) view->data = event.frame.device_rows();
  if (!view.ok()) {
    ++counters_.bad_frames;
    log::Warning("experts", StrCat("bad message peer=", ToString(event.peer), ": ", view.status().message()));
    return;
  }
  if (counters_.queued_rows + header.rows > options_.queued_rows_max) {
    ++counters_.dropped_frames;
    return;
  }
  counters_.queued_rows += header.rows;
  queues_[static_cast<int>(header.traffic_class)].push_back({std::move(event.frame), event.peer, *view});
}

void ExpertEngine::PollTransport() {
  transport_->Poll([&](transport::Event& event) {
    switch (event.kind) {
      case transport::Event::Kind::kFrame:
        if (UnitExchange::IsUnitKind(event.frame.header().kind))
          return exchange_.OnFrame(event.peer, event.frame);
        return Accept(event);
      case transport::Event::Kind::kPeerUp:
        return exchange_.OnPeerUp(event.peer);
      case transport::Event::Kind::kPeerLost:
        exchange_.OnPeerLost(event.peer);
        log::Info("experts", StrCat("peer lost peer=", ToString(event.peer), ": ", event.reason.message()));
        return;
    }
  });
}

FrameRef ExpertEngine::RowListFrame(const wire::FrameHeader& request, wire::Kind kind,
                                    std::span<const GroupRow> rows, const wire::WorkView& view) {
  FrameRef frame =
      transport_->frames().Allocate(static_cast<uint32_t>(rows.size() * sizeof(wire::PartialRow)));
  const std::span<wire::PartialRow> out =
      wire::LayOutRowList(static_cast<uint32_t>(rows.size()), frame.payload_span());
  for (size_t i = 0; i < rows.size(); ++i) out[i] = {view.rows[rows[i].row].row, rows[i].group, 0};
  FillReply(request, kind, static_cast<uint32_t>(rows.size()), epoch_, frame);
  return frame;
}

// Takes the next launch's jobs off the queues. False if there is none.
bool ExpertEngine::RunLaunch() {
  for (int c = 0; c < wire::kNumTrafficClasses; ++c) {
    std::vector<Job>& queue = queues_[c];
    if (queue.empty()) continue;
    const bool decode = c == static_cast<int>(wire::TrafficClass::kDecode);
    const int64_t rows_max = decode ? options_.decode_rows_max : options_.prefill_rows_max;
    const uint16_t layer = queue.front().frame.header().layer;
    int64_t rows = 0;
    jobs_.clear();
    auto kept = queue.begin();
    for (Job& job : queue) {
      const wire::FrameHeader& header = job.frame.header();
      if (header.layer == layer && (rows == 0 || rows + header.rows <= rows_max)) {
        rows += header.rows;
        jobs_.push_back(std::move(job));
      } else {
        if (&*kept != &job) *kept = std::move(job);
        ++kept;
      }
    }
    queue.erase(kept, queue.end());
    counters_.queued_rows -= rows;
    counters_.rows += rows;
    ++counters_.launches;
    const Clock::time_point begin = Clock::now();
    Answer(jobs_);
    jobs_.clear();
    const int64_t took_ns = NsSince(begin);
    live_counters_.busy_ns.fetch_add(took_ns, std::memory_order_relaxed);
    live_counters_.launch_seconds[c]->Observe(static_cast<double>(took_ns) * 1e-9);
    live_counters_.launch_rows[c]->Observe(static_cast<double>(rows));
    return true;
  }
  return false;
}

FrameRef ExpertEngine::PartialFrame(uint32_t rows) {
  const uint32_t bytes = wire::PartialPayloadBytes(shape_, rows);
  if (transport::RowMemory* const memory = transport_->row_memory()) {
    const uint32_t offset = wire::RowDataOffset(rows * static_cast<uint32_t>(sizeof(wire::PartialRow)));
    FrameRef frame = transport_->frames().AllocateWithRows(bytes, offset, *memory);
    if (frame) return frame;
  }
  return transport_->frames().Allocate(bytes);
}

void ExpertEngine::Answer(std::span<const Job> jobs) {
  const uint32_t layer = jobs.front().frame.header().layer;
  static thread_local std::vector<GroupRow> missing;
  static thread_local std::vector<size_t> hosted_end;  // of each job
  launch_.clear();
  hosted_.clear();
  hosted_end.clear();
  for (uint32_t j = 0; j < jobs.size(); ++j) {
    launch_.push_back({.view = jobs[j].view, .in_row_memory = jobs[j].frame.device_rows() != nullptr});
    missing.clear();
    SplitByGroup(config_, units_, layer, j, jobs[j].view, hosted_, missing);
    hosted_end.push_back(hosted_.size());
    if (!missing.empty()) {
      counters_.nacked_rows += missing.size();
      (void)transport_->Send(NodeId{jobs[j].frame.header().origin},
                             RowListFrame(jobs[j].frame.header(), wire::Kind::kNack, missing, jobs[j].view));
    }
  }
  // Results are written straight into the messages that carry them.
  sums_.resize(hosted_.size());
  finite_.assign(hosted_.size(), 1);
  const size_t partial_rows_max = wire::PartialRowsMax(shape_);
  for (size_t j = 0, begin = 0; j < jobs.size(); ++j) {
    for (; begin < hosted_end[j];) {
      const size_t end = std::min(hosted_end[j], begin + partial_rows_max);
      const uint32_t rows = static_cast<uint32_t>(end - begin);
      FrameRef frame = PartialFrame(rows);
      const wire::PartialSpans spans = wire::LayOutPartial(shape_, rows, frame.payload_span());
      const bool in_row_memory = frame.device_rows() != nullptr;
      std::byte* const data = in_row_memory ? frame.device_rows() : spans.data;
      for (size_t i = begin; i < end; ++i) {
        spans.rows[i - begin] = {jobs[j].view.rows[hosted_[i].row].row, hosted_[i].group, 0};
        sums_[i] = {data + (i - begin) * shape_.row_bytes(), in_row_memory};
      }
      FillReply(jobs[j].frame.header(), wire::Kind::kPartial, rows, epoch_, frame);
      replies_.push_back({std::move(frame), j, begin, end});
      begin = end;
    }
  }
  for (const GroupRow& row : hosted_)
    live_counters_.UnitRows({layer, row.group}).fetch_add(1, std::memory_order_relaxed);
  if (!hosted_.empty()) {
    const absl::Status run = backend_.Run(units_, layer, launch_, hosted_, sums_, finite_);
    if (!run.ok()) DeviceLost(run);
  }
  for (Reply& reply : replies_) {
    std::vector<GroupRow> rejected;
    for (size_t i = reply.begin; i < reply.end; ++i) {
      if (finite_[i] == 0) rejected.push_back(hosted_[i]);
    }
    if (!rejected.empty()) {
      SendWithout(rejected, reply, jobs[reply.job]);
      continue;
    }
    // An origin that is gone needs no answer.
    (void)transport_->Send(NodeId{jobs[reply.job].frame.header().origin}, std::move(reply.frame));
  }
  replies_.clear();
  for (const Job& job : jobs) {
    transport_->ReturnCredit(job.from, job.frame.header().traffic_class, job.frame.header().rows);
  }
}

// Rare: the sums that are not finite are named, the others sent in a message without them.
void ExpertEngine::SendWithout(std::span<const GroupRow> rejected, const Reply& reply, const Job& job) {
  const wire::FrameHeader& request = job.frame.header();
  const NodeId origin{request.origin};
  counters_.rejected_rows += rejected.size();
  (void)transport_->Send(origin, RowListFrame(request, wire::Kind::kReject, rejected, job.view));
  const uint32_t good = static_cast<uint32_t>(reply.end - reply.begin - rejected.size());
  if (good == 0) return;
  FrameRef frame = PartialFrame(good);
  const wire::PartialSpans spans = wire::LayOutPartial(shape_, good, frame.payload_span());
  std::vector<transport::RowCopy> into_row_memory;
  uint32_t next = 0;
  for (size_t i = reply.begin; i < reply.end; ++i) {
    if (finite_[i] == 0) continue;
    const int64_t offset = next * shape_.row_bytes();
    spans.rows[next++] = {job.view.rows[hosted_[i].row].row, hosted_[i].group, 0};
    if (frame.device_rows() != nullptr) {
      into_row_memory.push_back({frame.device_rows() + offset, sums_[i].at, !sums_[i].in_row_memory});
    } else if (sums_[i].in_row_memory) {
      const absl::Status copied =
          transport_->row_memory()->CopyToHost(spans.data + offset, sums_[i].at, shape_.row_bytes());
      if (!copied.ok()) DeviceLost(copied);
    } else {
      std::memcpy(spans.data + offset, sums_[i].at, shape_.row_bytes());
    }
  }
  if (!into_row_memory.empty()) {
    const absl::Status copied = transport_->row_memory()->CopyRows(into_row_memory);
    if (!copied.ok()) DeviceLost(copied);
  }
  FillReply(request, wire::Kind::kPartial, good, epoch_, frame);
  (void)transport_->Send(origin, std::move(frame));
}

void ExpertEngine::Run() {
  absl::Time published = absl::InfinitePast();
  while (!stop_.load()) {
    const absl::Time now = absl::Now();
    const bool due = now - published >= kStatusPeriod;
    if (due) published = now;
    TakeMail(due);
    PollTransport();
    const bool launched = RunLaunch();
    const absl::Status ticked = exchange_.Tick(
        units_, [this](UnitId unit) { return backend_.UnitLayout(unit); }, launched);
    if (!ticked.ok()) DeviceLost(ticked);
    if (launched || exchange_.Due()) continue;
    TakeMail(/*publish=*/true);
    const Clock::time_point begin = Clock::now();
    transport_->Wait(kIdleWait);
    live_counters_.idle_ns.fetch_add(NsSince(begin), std::memory_order_relaxed);
  }
}

}  // namespace minke::experts
