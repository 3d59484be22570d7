#include "services/attention/engine/engine.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <variant>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::attention {
namespace {

// Head rows whose logits are held at once: 64 x 102,400 x 4 B = 25 MiB.
constexpr int64_t kLogitRowsMax = 64;
constexpr char kTag[] = "attention";
constexpr absl::Duration kIdleWait = absl::Milliseconds(100);
// Longest sleep inside a step: deadlines of the exchange are looked at this often.
constexpr absl::Duration kExchangeWait = absl::Milliseconds(2);

// Rows of a microbatch below which sending it alone gains less than reading the weights once more costs.
constexpr int64_t kMicrobatchRowsMin = 16;

absl::Status OutcomeError(RowOutcome outcome) {
  return outcome == RowOutcome::kRejected
             ? absl::InternalError("the model produced values that are not finite for this request")
             : absl::UnavailableError("the experts of this request could not be reached in time");
}

PageExchangeOptions PageOptions(const EngineOptions& options) {
  PageExchangeOptions pages = options.page_exchange;
  pages.enabled &= options.limits.reuse_prefixes;  // fetched pages would not be found
  return pages;
}

}  // namespace

std::string_view ToString(StepKind kind) {
  switch (kind) {  // no default: a new kind must fail the build
    case StepKind::kDecode:
      return "decode";
    case StepKind::kPrefill:
      return "prefill";
    case StepKind::kMixed:
      return "mixed";
  }
  return "unknown";
}

StepHistograms::StepHistograms()
    : rows(std::make_unique<telemetry::Histogram>(
          std::vector<double>{1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384})) {
  for (auto& histogram : seconds)
    histogram = std::make_unique<telemetry::Histogram>(telemetry::StepSecondsBuckets());
}

int MicrobatchesMax(const EngineOptions& options) {
  return options.microbatches > 0 ? options.microbatches : 2;
}

struct Engine::Command {
  struct CancelSessionCommand {
    uint64_t session;
  };
  std::variant<Request, RequestKey, CancelSessionCommand, ClusterSnapshot> body;
};

Engine::Engine(std::unique_ptr<AttentionModel> model, std::unique_ptr<transport::Transport> transport,
               std::unique_ptr<router::Gate> local_gate, ThreadPool& pool, EngineOptions options,
               std::vector<uint8_t> allowed_tokens, OutputSink sink)
    : options_(options),
      model_(std::move(model)),
      transport_(std::move(transport)),
      local_gate_(std::move(local_gate)),
      pool_(pool),
      allowed_tokens_(std::move(allowed_tokens)),
      sink_(std::move(sink)),
      pages_(model_->cache_pages()),
      scheduler_(options.limits, pages_),
      exchange_(model_->config(), model_->precision(), *transport_, options.exchange,
                MicrobatchesMax(options), local_gate_.get(), pool),
      page_exchange_(PageOptions(options_), *model_, pages_, *transport_),
      peers_(*transport_),
      lanes_(MicrobatchesMax(options)),
      profile_(options_.trace_file, options_.trace_steps) {
  for (size_t i = 0; i < lanes_.size(); ++i) lanes_[i].batch.index = static_cast<int>(i);
  PublishStatus();
}

Engine::~Engine() = default;

absl::Status Engine::Submit(Request request) {
  request.received = absl::Now();
  {
    const MutexLock lock(mutex_);
    if (std::ssize(mail_) >= options_.mailbox_max) {
      return absl::ResourceExhaustedError(
          StrCat("the engine has ", mail_.size(), " submissions it has not seen yet"));
    }
    mail_.push_back({std::move(request)});
    has_mail_.store(true);
  }
  transport_->Wake();
  return absl::OkStatus();
}

void Engine::Cancel(const RequestKey& key) {
  const MutexLock lock(mutex_);
  mail_.push_back({key});  // one per submission at most, so bounded by what was let in
  has_mail_.store(true);
}

void Engine::CancelSession(uint64_t session) {
  const MutexLock lock(mutex_);
  mail_.push_back({Command::CancelSessionCommand{session}});
  has_mail_.store(true);
}

void Engine::UpdateCluster(ClusterSnapshot snapshot) {
  {
    const MutexLock lock(mutex_);
    mail_.push_back({std::move(snapshot)});
    has_mail_.store(true);
  }
  transport_->Wake();
}

void Engine::Stop() {
  stop_.store(true);
  transport_->Wake();
}

EngineStatus Engine::status() const {
  const MutexLock lock(mutex_);
  return status_;
}

void Engine::PublishStatus() {
  const ExchangeCounters& counters = exchange_.counters();
  EngineStatus status;
  status.running = scheduler_.running();
  status.waiting = scheduler_.waiting() + page_exchange_.fetching();
  status.pages_total = pages_.total();
  status.pages_used = pages_.used();
  status.phase_seconds = profile_.seconds();
  status.split_steps = split_steps_;
  status.computed_tokens = computed_tokens_;
  status.pages_cached = pages_.cached();
  status.reuse_queries = scheduler_.reuse_queries();
  status.reuse_hits = scheduler_.reuse_hits();
  status.steps = step_;
  status.preemptions = scheduler_.preemptions();
  status.redispatched_rows = counters.redispatched_rows;
  status.hedged_rows = counters.hedged_rows;
  status.dispatched_rows = counters.dispatched_rows;
  status.plan_retries = counters.plan_retries;
  status.router_failovers = counters.router_failovers;
  status.expert_failovers = counters.expert_failovers;
  status.page_bytes = model_->CacheBytesPerToken() * kernels::kPageTokens;
  status.stale_frames = counters.stale_frames;
  status.duplicate_rows = counters.duplicate_rows;
  const PageExchangeCounters& moved = page_exchange_.counters();
  status.bad_frames = counters.bad_frames + moved.bad_frames;
  status.pages_fetched = moved.pages_fetched;
  status.pages_given = moved.pages_given;
  status.fetches_failed = moved.fetches_failed;
  status.giving = page_exchange_.giving();
  status.generated_tokens = generated_tokens_;
  status.prompt_tokens = prompt_tokens_;
  if (std::exchange(reach_changed_, false)) connected_ = Connected();
  status.connected = connected_;
  const MutexLock lock(mutex_);
  status_ = status;
}

bool Engine::Connected() const {
  if (model_->whole() != nullptr) return true;
  if (cluster_.placement == nullptr) return false;
  const auto up = [&](const auto& peer) { return peers_.IsUp(peer.first); };
  const bool routed =
      local_gate_ != nullptr || std::any_of(cluster_.routers.begin(), cluster_.routers.end(), up);
  if (!routed) return false;
  // Of replicas one is enough: a dead server may be a member until its lease runs out.
  if (cluster_.placement->units().empty()) {
    return std::all_of(cluster_.experts.begin(), cluster_.experts.end(), up);
  }
  return cluster_.placement->Served([&](NodeId server) { return peers_.IsUp(server); });
}

void Engine::ConnectToPeers() {
  std::map<NodeId, std::string> wanted = cluster_.experts;
  wanted.insert(cluster_.routers.begin(), cluster_.routers.end());
  wanted.merge(page_exchange_.WantedPeers());
  peers_.SetWanted(std::move(wanted));
}

void Engine::ApplyCluster() {
  reach_changed_ = true;
  page_exchange_.SetNodes(cluster_.attention);
  ConnectToPeers();
  std::vector<NodeId> routers;
  for (const auto& [router, address] : cluster_.routers) routers.push_back(router);
  exchange_.SetRouters(std::move(routers));
  exchange_.RetainNodes(
      [&](NodeId node) { return cluster_.routers.contains(node) || cluster_.experts.contains(node); });
  if (cluster_.placement != nullptr) exchange_.SetPlacement(cluster_.placement);
}

void Engine::Admit(Request request, std::vector<RequestEvent>& refused) {
  const RequestKey key = request.key;
  auto sequence = std::make_unique<Sequence>(std::move(request));
  const Request& r = sequence->request;
  if (options_.tracer != nullptr && !r.traceparent.empty()) {
    const auto parent = tracing::ParseTraceparent(r.traceparent);
    if (parent && parent->sampled) {
      sequence->trace =
          std::make_unique<SequenceTrace>(options_.tracer, *parent, r.name, absl::ToChronoTime(r.received));
    }
  }
  if (absl::Status status = scheduler_.Add(std::move(sequence)); !status.ok()) {
    refused.push_back({.key = key, .finish = FinishReason::kError, .error = status});
  }
}

// Between steps: a bounded piece of work.
void Engine::ExchangePages() {
  std::vector<RequestEvent> refused;
  // A page for each running sequence, which would otherwise be preempted for want of it.
  for (Request& request : page_exchange_.Tick(absl::Now(), scheduler_.running()))
    Admit(std::move(request), refused);
  if (page_exchange_.TakePeersChanged()) ConnectToPeers();
  if (!refused.empty()) Emit(std::move(refused));
}

void Engine::TakeMail() {
  if (!has_mail_.load()) return;
  std::vector<Command> mail;
  {
    const MutexLock lock(mutex_);
    mail.swap(mail_);
    has_mail_.store(false);
  }
  std::vector<RequestEvent> refused;
  for (Command& command : mail) {
    if (auto* request = std::get_if<Request>(&command.body)) {
      prompt_tokens_ += request->prompt.size();
      if (request->pages_from != NodeId{}) {
        page_exchange_.Fetch(std::move(*request));
      } else {
        Admit(std::move(*request), refused);
      }
    } else if (auto* key = std::get_if<RequestKey>(&command.body)) {
      page_exchange_.Cancel(*key);
      scheduler_.Cancel(*key);
    } else if (auto* session = std::get_if<Command::CancelSessionCommand>(&command.body)) {
      page_exchange_.CancelSession(session->session);
      scheduler_.CancelSession(session->session);
    } else if (auto* snapshot = std::get_if<ClusterSnapshot>(&command.body)) {
      cluster_ = std::move(*snapshot);
      ApplyCluster();
    }
  }
  Emit(std::move(refused));
}

void Engine::Emit(std::vector<RequestEvent> events) {
  std::vector<PrefixChange> prefixes = pages_.TakeChanges();
  if (!events.empty() || !prefixes.empty()) sink_({std::move(events), std::move(prefixes)});
}

void Engine::PollTransport() {
  transport_->Poll([&](transport::Event& event) {
    switch (event.kind) {
      case transport::Event::Kind::kFrame:
        if (PageExchange::IsPageKind(event.frame.header().kind))
          return page_exchange_.OnFrame(event.peer, event.frame);
        return exchange_.OnFrame(event.frame);
      case transport::Event::Kind::kPeerUp:
        peers_.OnPeerUp(event.peer);
        reach_changed_ = true;
        page_exchange_.OnPeerUp(event.peer);
        return exchange_.OnPeerUp(event.peer);
      case transport::Event::Kind::kPeerLost:
        log::Warning("attention",
                     StrCat("peer lost peer=", ToString(event.peer), ": ", event.reason.message()));
        peers_.OnPeerLost(event.peer);
        reach_changed_ = true;
        page_exchange_.OnPeerLost(event.peer);
        return exchange_.OnPeerLost(event.peer);
    }
  });
  for (const NodeId dropped : peers_.Tick(absl::Now())) {
    page_exchange_.OnPeerLost(dropped);
    exchange_.OnPeerLost(dropped);
    reach_changed_ = true;
  }
}

void Engine::Run() {
  while (!stop_.load()) {
    profile_.Enter(StepPhase::kPlan);
    TakeMail();
    PollTransport();
    ExchangePages();
    std::vector<RequestEvent> refused;
    std::vector<StepChunk> chunks =
        scheduler_.PlanStep(absl::Now(), [&](const Sequence& sequence, absl::Status error) {
          if (sequence.trace != nullptr) sequence.trace->Failed(std::string(StdView(error.message())));
          refused.push_back(
              {.key = sequence.request.key, .finish = FinishReason::kError, .error = std::move(error)});
        });
    Emit(std::move(refused));
    PublishStatus();
    if (chunks.empty()) {
      profile_.Enter(StepPhase::kIdle);
      if (page_exchange_.Due()) continue;
      transport_->Wait(scheduler_.HasWork() || !page_exchange_.Idle() ? kExchangeWait : kIdleWait);
      continue;
    }
    int64_t decode_rows = 0, prompt_rows = 0;
    for (const StepChunk& chunk : chunks) (chunk.count == 1 ? decode_rows : prompt_rows) += chunk.count;
    const absl::Time begin = absl::Now();
    RunStep(std::move(chunks));
    const absl::Duration took = absl::Now() - begin;
    scheduler_.StepTook(took, decode_rows, prompt_rows);
    const StepKind kind = prompt_rows == 0   ? StepKind::kDecode
                          : decode_rows == 0 ? StepKind::kPrefill
                                             : StepKind::kMixed;
    step_histograms_.seconds[static_cast<int>(kind)]->Observe(absl::ToDoubleSeconds(took));
    step_histograms_.rows->Observe(static_cast<double>(decode_rows + prompt_rows));
  }
}

// Two microbatches keep this node busy while the other's rows are away, at the price of reading the weights
// twice. That pays where the experts have memory of their own, and enough to do.
int64_t Engine::MicrobatchesFor(const std::vector<StepChunk>& chunks) const {
  if (model_->whole() != nullptr) return 1;
  if (options_.microbatches > 0) return options_.microbatches;
  int64_t rows = 0;
  for (const StepChunk& chunk : chunks) rows += chunk.count;
  return cluster_.experts_elsewhere && chunks.size() > 1 && rows >= 2 * kMicrobatchRowsMin ? 2 : 1;
}

void Engine::FillLanes(const std::vector<StepChunk>& chunks) {
  const int64_t in_use = MicrobatchesFor(chunks);
  if (in_use > 1 && chunks.size() > 1) ++split_steps_;
  for (Lane& lane : lanes_) {
    lane.batch.rows.clear();
    lane.batch.chunks.clear();
    lane.chunks.clear();
    lane.rows_planned = 0;
    lane.layer = 0;
    lane.traffic_class = wire::TrafficClass::kDecode;
  }
  // Longest first onto the emptiest lane. A sequence stays whole: its rows see each other's latents.
  order_ = chunks;
  std::stable_sort(order_.begin(), order_.end(),
                   [](const StepChunk& a, const StepChunk& b) { return a.count > b.count; });
  for (const StepChunk& chunk : order_) {
    Lane& lane = *std::min_element(lanes_.begin(), lanes_.begin() + in_use, [](const Lane& a, const Lane& b) {
      return a.rows_planned < b.rows_planned;
    });
    if (chunk.count > 1) lane.traffic_class = wire::TrafficClass::kPrefill;
    lane.chunks.push_back(chunk);
    lane.rows_planned += chunk.count;
  }
  const auto form = [&](const StepChunk& chunk) { return model_->FormOf(chunk.count, chunk.begin); };
  for (Lane& lane : lanes_) {
    std::partition(lane.chunks.begin(), lane.chunks.end(),
                   [&](const StepChunk& chunk) { return form(chunk) == kernels::MlaForm::kAbsorbed; });
    for (const StepChunk& chunk : lane.chunks) {
      lane.batch.chunks.push_back({.row_begin = lane.batch.size(),
                                   .rows = chunk.count,
                                   .position_begin = chunk.begin,
                                   .pages = chunk.sequence->pages,
                                   .form = form(chunk)});
      for (int64_t position = chunk.begin; position < chunk.begin + chunk.count; ++position) {
        lane.batch.rows.push_back({.token = chunk.sequence->tokens[position],
                                   .page = chunk.sequence->pages[position / kernels::kPageTokens],
                                   .page_slot = static_cast<uint32_t>(position % kernels::kPageTokens),
                                   .position = position});
      }
    }
  }
  for (Lane& lane : lanes_) {
    lane.phase = lane.batch.rows.empty() ? Phase::kDone : Phase::kCompute;
    lane.outcomes.assign(lane.batch.size(), RowOutcome::kOk);
  }
}

// Tells traces that their sequences are in this step. It is traced layer by layer for one of those that want
// it: others will have another.
void Engine::TraceStep() {
  bool wanted = false;
  tracing::Time now{};
  int64_t sequences = 0, rows = 0;
  for (const Lane& lane : lanes_) sequences += std::ssize(lane.chunks), rows += lane.batch.size();
  for (Lane& lane : lanes_) {
    lane.trace = nullptr;
    for (const StepChunk& chunk : lane.chunks) {
      SequenceTrace* const trace = chunk.sequence->trace.get();
      if (trace == nullptr) continue;
      if (now == tracing::Time{}) now = tracing::Now();
      trace->Admitted(now, chunk.sequence->prompt_size(),
                      std::max<int64_t>(chunk.sequence->cached_tokens, 0));
      const bool decode = chunk.begin >= chunk.sequence->prompt_size();
      if (wanted || !trace->WantsStep(decode)) continue;
      wanted = true;
      lane.trace = trace;
      lane.step_span = trace->BeginStep(now, step_, rows, sequences, decode);
    }
  }
}

void Engine::RecordExchange(Lane& lane) {
  tracing::Span layer{
      .trace = lane.step_span.trace,
      .id = tracing::NewSpanId(),
      .parent = lane.step_span.span,
      .name = StrCat("layer ", lane.layer),
      .begin = absl::ToChronoTime(lane.exchange_begin),
      .end = tracing::Now(),
      .attributes = {{"minke.layer", int64_t{lane.layer}}, {"minke.rows", lane.batch.size()}}};
  for (const ExchangeLeg& leg : lane.legs) {
    lane.trace->tracer().Record(
        {.trace = layer.trace,
         .id = tracing::NewSpanId(),
         .parent = layer.id,
         .name = leg.routing ? "route" : "experts",
         .kind = tracing::SpanKind::kClient,
         .begin = absl::ToChronoTime(leg.begin),
         .end = absl::ToChronoTime(leg.end),
         .attributes = {{"minke.node", ToString(leg.node)}, {"minke.rows", int64_t{leg.rows}}}});
  }
  lane.legs.clear();
  lane.trace->tracer().Record(std::move(layer));
}

// Computes until the lane has to wait for experts or has passed the last layer.
void Engine::Advance(Lane& lane, int index) {
  const ModelConfig& config = model_->config();
  profile_.Enter(StepPhase::kAttention, lane.layer);
  if (lane.layer == 0) model_->Embed(lane.batch);
  while (lane.layer < config.num_hidden_layers) {
    if (config.IsMoeLayer(lane.layer)) {
      const absl::Time now = BeginExchange(lane, index);
      if (lane.trace != nullptr) {
        lane.exchange_begin = now;
        exchange_.Trace(index, &lane.legs);
      }
      profile_.Enter(StepPhase::kSharedExperts, lane.layer);
      model_->FeedForward(lane.layer, lane.batch);  // the shared experts, while the rows are away
      lane.phase = Phase::kExchange;
      profile_.Enter(StepPhase::kWait, lane.layer);
      return;
    }
    model_->Attention(lane.layer, lane.batch, nullptr);
    model_->FeedForward(lane.layer, lane.batch);
    ++lane.layer;
  }
  lane.phase = Phase::kDone;
}

// Attention of a layer with routed experts, whose rows are then on their way; returns since when.
absl::Time Engine::BeginExchange(Lane& lane, int index) {
  const ModelConfig& config = model_->config();
  if (RowsOnDevice* const device = model_->on_device()) {
    const std::byte* rows = device->AttentionRows(lane.layer, lane.batch);
    profile_.Enter(StepPhase::kDispatch, lane.layer);
    const absl::Time now = absl::Now();
    exchange_.BeginOnDevice(index, step_, lane.layer, lane.traffic_class, rows, lane.batch.size(), now);
    return now;
  }
  std::byte* rows = exchange_.RowsOfMessage(index, lane.batch.size());
  if (rows == nullptr) {
    lane.rows.resize(lane.batch.size() * config.hidden_size * ActivationBytes(model_->precision()));
    rows = lane.rows.data();
  }
  model_->Attention(lane.layer, lane.batch, rows);
  profile_.Enter(StepPhase::kDispatch, lane.layer);
  const absl::Time now = absl::Now();
  exchange_.Begin(index, step_, lane.layer, lane.traffic_class, rows, lane.batch.size(), now);
  return now;
}

void Engine::FinishExchange(Lane& lane, int index) {
  profile_.Enter(StepPhase::kCombine, lane.layer);
  exchange_outcomes_.resize(lane.batch.size());
  if (RowsOnDevice* const device = model_->on_device()) {
    exchange_.CombineOnDevice(index, device->combiner(), device->DeviceSums(lane.batch), exchange_outcomes_);
    device->AddDeviceSums(lane.batch);
  } else {
    exchange_.Combine(index, model_->RoutedTarget(lane.batch), exchange_outcomes_);
    model_->AddRouted(lane.batch);
  }
  if (lane.trace != nullptr) RecordExchange(lane);
  for (size_t i = 0; i < exchange_outcomes_.size(); ++i) {
    if (lane.outcomes[i] == RowOutcome::kOk) lane.outcomes[i] = exchange_outcomes_[i];
  }
  ++lane.layer;
  lane.phase = lane.layer == model_->config().num_hidden_layers ? Phase::kDone : Phase::kCompute;
}

void Engine::RunStep(std::vector<StepChunk> chunks) {
  ++step_;
  FillLanes(chunks);
  TraceStep();
  int64_t rows = 0;
  for (const Lane& lane : lanes_) rows += lane.batch.size();
  profile_.StepBegins(rows);
  if (WholeSteps* whole = model_->whole()) {
    ComputeWhole(*whole, lanes_.front());
  } else {
    ComputeLanes();
  }
  if (stop_.load()) return;
  profile_.Enter(StepPhase::kOutput);
  // Since the last step's, so with what that one still had to do.
  for (int i = 0; i < kStepPhases; ++i)
    step_seconds_[i] = profile_.seconds()[i] - std::exchange(accounted_[i], profile_.seconds()[i]);
  step_seconds_[static_cast<int>(StepPhase::kIdle)] = 0;
  std::vector<RequestEvent> events;
  for (Lane& lane : lanes_) CollectOutputs(lane, events);
  PublishStatus();  // before the events: whoever sees a stream end may look at the pages next
  Emit(std::move(events));
}

// All lanes through all layers, one computing while another's rows are away.
void Engine::ComputeLanes() {
  const auto done = [&] {
    return std::all_of(lanes_.begin(), lanes_.end(),
                       [](const Lane& lane) { return lane.phase == Phase::kDone; });
  };
  while (!done() && !stop_.load()) {
    bool progressed = false;
    for (int i = 0; i < std::ssize(lanes_); ++i) {
      if (lanes_[i].phase != Phase::kCompute) continue;
      Advance(lanes_[i], i);
      PollTransport();
      progressed = true;
    }
    PollTransport();
    for (int i = 0; i < std::ssize(lanes_); ++i) {
      if (lanes_[i].phase != Phase::kExchange || !exchange_.Done(i)) continue;
      FinishExchange(lanes_[i], i);
      progressed = true;
    }
    if (progressed) continue;
    exchange_.Tick(absl::Now());
    // The view of the cluster may change while we wait for a server that is gone.
    TakeMail();
    transport_->Wait(kExchangeWait);
  }
}

// A step without an exchange; the model draws the tokens it can.
void Engine::ComputeWhole(WholeSteps& whole, Lane& lane) {
  PollTransport();
  profile_.Enter(StepPhase::kAttention);
  PlanOutputs(lane);
  std::vector<DrawRow> draws;
  std::vector<uint32_t> tokens(outputs_.size());
  for (const OutputRow& output : outputs_) {
    const Sequence& sequence = *lane.chunks[output.chunk].sequence;
    const SamplingParams& params = sequence.request.sampling;
    const bool draw = !output.prompt_token && !params.want_logprobs && whole.CanDraw(params);
    draws.push_back({output.row, draw ? &params : nullptr, std::ssize(sequence.tokens)});
  }
  whole.Step(lane.batch, draws, tokens);
  for (size_t i = 0; i < outputs_.size(); ++i) {
    if (draws[i].params == nullptr) continue;
    outputs_[i].drawn = true;
    outputs_[i].token = tokens[i];
    if (tokens[i] == WholeSteps::kNoToken) lane.outcomes[outputs_[i].row] = RowOutcome::kRejected;
  }
  lane.phase = Phase::kDone;
}

// The rows of a lane whose logits matter, in the order of its chunks.
void Engine::PlanOutputs(const Lane& lane) {
  outputs_.clear();
  for (size_t c = 0; c < lane.chunks.size(); ++c) {
    const StepChunk& chunk = lane.chunks[c];
    const Sequence& sequence = *chunk.sequence;
    const int64_t first = lane.batch.chunks[c].row_begin;
    const SamplingParams& params = sequence.request.sampling;
    for (int64_t i = 0; params.want_prompt_logprobs && i < chunk.count; ++i) {
      const int64_t next = chunk.begin + i + 1;
      if (next < sequence.prompt_size() && next > sequence.prompt_logprobs_done) {
        outputs_.push_back({static_cast<int32_t>(first + i), c, sequence.tokens[next]});
      }
    }
    if (chunk.begin + chunk.count == std::ssize(sequence.tokens) &&
        sequence.generated_size() < params.max_tokens) {
      outputs_.push_back({static_cast<int32_t>(first + chunk.count - 1), c, std::nullopt});
    }
  }
}

// Log-probabilities, and the tokens the model did not draw, from logits in host memory.
void Engine::DrawOnHost(const Lane& lane) {
  const int64_t vocab = model_->config().vocab_size;
  std::vector<OutputRow*> open;
  for (OutputRow& output : outputs_) {
    if (!output.drawn) open.push_back(&output);
  }
  std::vector<int32_t> selected;
  for (size_t begin = 0; begin < open.size(); begin += kLogitRowsMax) {
    const size_t count = std::min<size_t>(kLogitRowsMax, open.size() - begin);
    selected.clear();
    for (size_t i = 0; i < count; ++i) selected.push_back(open[begin + i]->row);
    float* logits = logits_.Resize(static_cast<int64_t>(count) * vocab);
    profile_.Enter(StepPhase::kHead);
    model_->Logits(lane.batch, selected, logits);
    profile_.Enter(StepPhase::kSampling);
    pool_.ParallelFor(static_cast<int64_t>(count), [&](int64_t i) {
      OutputRow& output = *open[begin + i];
      const Sequence& sequence = *lane.chunks[output.chunk].sequence;
      const SamplingParams& params = sequence.request.sampling;
      const std::span<float> row(logits + i * vocab, vocab);
      if (output.prompt_token) {
        output.logprobs = Logprobs(row, *output.prompt_token, params.top_prompt_logprobs);
        return;
      }
      // Log-probabilities are of the plain distribution; sampling changes the row.
      std::vector<float> plain;
      if (params.want_logprobs) plain.assign(row.begin(), row.end());
      output.token = Sample(params, sequence.counts, allowed_tokens_, std::ssize(sequence.tokens), row);
      if (params.want_logprobs) output.logprobs = Logprobs(plain, output.token, params.top_logprobs);
    });
  }
}

// The step and the layer's exchanges name the request's rows in the other processes' lines.
void Engine::LogEnd(const Sequence& sequence, const RequestEvent& event) const {
  const log::Level level = event.error.ok() ? log::Level::kDebug : log::Level::kWarning;
  if (!log::IsOn(level)) return;
  const std::string error(StdView(event.error.message()));
  const log::Field fields[] = {
      {"request_id", sequence.request.name},     {"step", step_},
      {"prompt_tokens", sequence.prompt_size()}, {"generated_tokens", sequence.generated_size()},
      {"cached_tokens", sequence.cached_tokens}, {"error", error}};
  log::Write(level, kTag, event.error.ok() ? "request done" : "request failed", fields,
             std::size(fields) - (event.error.ok() ? 1 : 0));
}

void Engine::CollectOutputs(Lane& lane, std::vector<RequestEvent>& events) {
  std::vector<RowOutcome> failed(lane.chunks.size(), RowOutcome::kOk);
  for (size_t c = 0; c < lane.chunks.size(); ++c) {
    const int64_t first = lane.batch.chunks[c].row_begin;
    for (int64_t i = 0; i < lane.chunks[c].count; ++i) {
      if (lane.outcomes[first + i] != RowOutcome::kOk) failed[c] = lane.outcomes[first + i];
    }
  }
  if (model_->whole() == nullptr) PlanOutputs(lane);
  std::erase_if(outputs_, [&](const OutputRow& output) { return failed[output.chunk] != RowOutcome::kOk; });
  DrawOnHost(lane);

  profile_.Enter(StepPhase::kOutput);
  size_t next_output = 0;
  for (size_t c = 0; c < lane.chunks.size(); ++c) {
    const StepChunk& chunk = lane.chunks[c];
    Sequence& sequence = *chunk.sequence;
    const SamplingParams& params = sequence.request.sampling;
    RequestEvent event{.key = sequence.request.key};
    if (failed[c] != RowOutcome::kOk) {
      event.finish = FinishReason::kError;
      event.error = OutcomeError(failed[c]);
    }
    sequence.computed = chunk.begin + chunk.count;
    computed_tokens_ += chunk.count;
    if (failed[c] == RowOutcome::kOk) scheduler_.Publish(sequence);
    for (; next_output < outputs_.size() && outputs_[next_output].chunk == c; ++next_output) {
      OutputRow& output = outputs_[next_output];
      if (output.prompt_token) {
        event.prompt_logprobs.push_back(std::move(output.logprobs));
        ++sequence.prompt_logprobs_done;
        continue;
      }
      const uint32_t token = output.token;
      sequence.tokens.push_back(token);
      ++sequence.counts.generated[token];
      ++generated_tokens_;
      event.tokens.push_back(token);
      if (params.want_logprobs) event.logprobs.push_back(std::move(output.logprobs));
      const auto& stops = params.stop_token_ids;
      if (std::find(stops.begin(), stops.end(), token) != stops.end()) event.finish = FinishReason::kStop;
    }
    const bool prompt_done = sequence.computed >= sequence.prompt_size();
    if (event.finish == FinishReason::kNone && prompt_done &&
        sequence.generated_size() >= params.max_tokens) {
      event.finish = FinishReason::kLength;
    }
    if (event.finish == FinishReason::kNone && !scheduler_.CanGrow(sequence))
      event.finish = FinishReason::kLength;
    const bool worth_sending =
        !event.tokens.empty() || !event.prompt_logprobs.empty() || event.finish != FinishReason::kNone;
    const bool finished = event.finish != FinishReason::kNone;
    const bool decode = chunk.begin >= sequence.prompt_size();
    (decode ? sequence.decode_times : sequence.prefill_times).Add(step_seconds_);
    if (sequence.trace != nullptr) {
      if (!event.error.ok()) sequence.trace->Failed(std::string(StdView(event.error.message())));
      sequence.trace->StepDone(tracing::Now(), decode, std::ssize(event.tokens), step_seconds_);
    }
    if (finished) {
      event.prefill_times = sequence.prefill_times;
      event.decode_times = sequence.decode_times;
      LogEnd(sequence, event);
    }
    if (worth_sending && !sequence.cancelled) {
      if (!std::exchange(sequence.cached_reported, true)) {
        event.cached_prompt_tokens = sequence.cached_tokens;
        event.queue_time = sequence.queue_time;
      }
      events.push_back(std::move(event));
    }
    if (finished) scheduler_.Finish(&sequence);
  }
  outputs_.clear();
}

}  // namespace minke::attention
