#include "services/attention/attention_service.h"

#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/cluster/rate_meter.h"
#include "libs/cluster/row_shape.h"
#include "libs/cluster/view.h"
#include "libs/collective/local_group.h"
#include "services/attention/layers/cpu_attention_model.h"
#include "services/attention/layers/cuda_models.h"
#include "services/attention/layers/tensor_parallel_model.h"

namespace minke::attention {

namespace {

constexpr absl::Duration kAskTimeout = absl::Seconds(10);
// A node that drains stays so long after its last work: gateways may not know yet that it leaves, and a node
// that has just been given one of its sequences asks for the pages after the step it is in.
constexpr absl::Duration kDrainLinger = absl::Seconds(2);

// Whether the node's weights are on one GPU as another node wants them.
bool HasWeightsToGive(const AttentionServiceOptions& o) {
  return o.device == Device::kCuda && o.tensor_parallel == 1 && !o.whole;
}

WeightsIdentity IdentityOf(const Checkpoint& checkpoint, const AttentionServiceOptions& o) {
  return {.model_fingerprint = absl::StrFormat("%016x", checkpoint.fingerprint()),
          .precision = std::string(ToString(o.precision)),
          .plan_checksum = HasWeightsToGive(o) ? WeightsChecksum(checkpoint.config()) : 0};
}

// Those that stay, if there are any.
std::map<NodeId, std::string> RoutersOf(const cluster::v1::ClusterView& view) {
  std::map<NodeId, std::string> staying, all = cluster::DataAddresses(view, cluster::v1::ROLE_ROUTER);
  for (const cluster::v1::Member& member : view.members()) {
    const auto router = all.find(NodeId{member.node_id()});
    if (router != all.end() && !member.draining()) staying.insert(*router);
  }
  return staying.empty() ? all : staying;
}

// How busy the node is; renewed every second.
void UpdateLoad(const EngineStatus& status, cluster::RateMeter& meter, cluster::v1::MemberLoad& load) {
  if (!meter.Begin(absl::Now())) return;
  load.set_running(static_cast<uint32_t>(status.running));
  load.set_waiting(static_cast<uint32_t>(status.waiting));
  load.set_cache_pages_used(static_cast<uint32_t>(status.pages_used));
  load.set_cache_pages_total(static_cast<uint32_t>(status.pages_total));
  load.set_tokens_per_s(meter.PerSecond(status.generated_tokens));
  load.set_redispatched_rows(status.redispatched_rows);
}

absl::StatusOr<std::unique_ptr<AttentionModel>> LoadModel(const std::shared_ptr<const Checkpoint>& checkpoint,
                                                          const AttentionServiceOptions& o, ThreadPool& pool,
                                                          absl::FunctionRef<void(int32_t)> progress) {
  if (!o.weights_from.empty() && !HasWeightsToGive(o)) {
    return absl::InvalidArgumentError("--weights-from: expected with --device=cuda and one rank only");
  }
  switch (o.device) {
    case Device::kCpu:
      if (o.tensor_parallel > 1) {
        std::vector<std::unique_ptr<Collective>> group = MakeLocalGroup(o.tensor_parallel);
        return TensorParallelModel::Load(o.tensor_parallel, o.threads, [&](int rank, ThreadPool& rank_pool) {
          return CpuAttentionModel::Load(checkpoint, o.precision, o.mla, rank_pool, progress,
                                         std::move(group[rank]));
        });
      }
      return CpuAttentionModel::Load(checkpoint, o.precision, o.mla, pool, progress);
    case Device::kCuda:
      if (o.tensor_parallel > 1 && o.whole) {
        return absl::InvalidArgumentError("--tensor-parallel: expected 1 for a whole model on one GPU");
      }
      if (o.tensor_parallel > 1) {
        return LoadCudaRanks(checkpoint, o.mla, o.tensor_parallel, o.threads, progress);
      }
      CudaModelOptions cuda{.mla = o.mla, .whole = o.whole, .fp8_experts = o.fp8_experts};
      if (!o.weights_from.empty()) {
        cuda.ask_for_weights = [&] {
          return AskForWeights(o.weights_from, IdentityOf(*checkpoint, o), kAskTimeout, o.identity);
        };
      }
      return LoadCudaModel(checkpoint, std::move(cuda), progress);
  }
  return absl::InternalError("unknown device");
}

}  // namespace

absl::StatusOr<std::unique_ptr<AttentionService>> AttentionService::Start(
    std::shared_ptr<const Checkpoint> checkpoint, std::unique_ptr<transport::Transport> transport,
    AttentionServiceOptions options) {
  std::unique_ptr<AttentionService> service(new AttentionService);
  service->options_ = std::move(options);
  AttentionServiceOptions& o = service->options_;
  service->pool_ = std::make_unique<ThreadPool>(o.threads);
  o.traces.service = "minke-attention";
  o.traces.instance = ToString(transport->self());
  MK_ASSIGN_OR_RETURN(service->tracer_, tracing::Tracer::Start(o.traces));
  o.engine.tracer = service->tracer_.get();
  const int32_t layers = checkpoint->config().num_hidden_layers;
  absl::Time last = absl::Now();
  const auto progress = [&](int32_t layer) {
    if (absl::Now() - last < absl::Seconds(1)) return;
    last = absl::Now();
    log::Info("attention", StrCat("loading layers: ", layer + 1, " of ", layers));
  };
  MK_ASSIGN_OR_RETURN(std::unique_ptr<AttentionModel> model,
                      LoadModel(checkpoint, o, *service->pool_, progress));
  if (o.wrap_model) model = o.wrap_model(std::move(model));
  const int64_t page_bytes = model->CacheBytesPerToken() * kernels::kPageTokens;
  const ModelLimits limits{
      .cache_pages = std::max<int64_t>(1, o.engine.cache_bytes / page_bytes),
      .microbatches = MicrobatchesMax(o.engine),
      .rows_max = std::max(o.engine.limits.step_tokens_max, o.engine.limits.sequences_max),
      .sequences_max = o.engine.limits.sequences_max,
      .row_memory = transport->row_memory(),
      .allowed_tokens = o.allowed_tokens};
  MK_RETURN_IF_ERROR(model->Prepare(limits));
  std::unique_ptr<router::Gate> gate;
  if (o.local_routing) {
    // On the GPU if rows are there, which they are with row memory.
    const transport::RowMemory* const row_memory = transport->row_memory();
    const Device gate_device = row_memory != nullptr && row_memory->on_gpu() ? Device::kCuda : Device::kCpu;
    const int32_t rows_max = MessageRowsMax(RowShapeOf(checkpoint->config(), o.precision));
    MK_ASSIGN_OR_RETURN(gate, router::LoadGateOrCpus("attention", *checkpoint, o.precision, gate_device,
                                                     rows_max, *service->pool_));
    gate->SetOverrideForTest(std::move(o.gate_override));
  }
  service->self_.set_node_id(transport->self().value);
  service->self_.set_role(cluster::v1::ROLE_ATTENTION);
  service->self_.set_data_address(transport->address());
  service->self_.set_pid(static_cast<uint32_t>(::getpid()));
  service->giver_ = std::make_unique<WeightGiver>(
      IdentityOf(*checkpoint, o), NewWeightsGroup,
      [raw = model.get()](const std::string& group, const std::atomic<bool>& stop) {
        return raw->GiveWeights(group, stop);
      });
  service->weights_api_.SetGiver(service->giver_.get());
  service->engine_ = std::make_unique<Engine>(
      std::move(model), std::move(transport), std::move(gate), *service->pool_, o.engine, o.allowed_tokens,
      [raw = service.get()](EngineOutput output) { raw->api_.Deliver(std::move(output)); });
  service->api_.SetEngine(service->engine_.get());
  MK_ASSIGN_OR_RETURN(service->server_,
                      rpc::GrpcServer::Start(o.listen, {&service->api_, &service->weights_api_}, o.identity));
  service->server_->SetServing(false);
  const std::string host = o.advertise_host.empty() ? rpc::HostOf(o.listen) : o.advertise_host;
  service->self_.set_rpc_address(StrCat(host, ":", service->server_->port()));
  service->engine_thread_ = std::thread([raw = service.get()] {
    SetThreadName("attn-engine");
    raw->engine_->Run();
  });

  cluster::v1::MemberReport report;
  report.set_model_fingerprint(absl::StrFormat("%016x", checkpoint->fingerprint()));
  report.set_precision(std::string(ToString(o.precision)));
  *report.mutable_member() = service->self_;
  report.mutable_member()->set_detail("connecting to the data plane");
  const auto on_update = [raw = service.get()](const cluster::v1::ClusterUpdate& update) {
    const cluster::v1::ClusterView& view = update.view();
    const bool elsewhere = std::any_of(view.members().begin(), view.members().end(), [&](const auto& member) {
      return member.role() == cluster::v1::ROLE_EXPERT &&
             rpc::HostOf(member.rpc_address()) != rpc::HostOf(raw->self_.rpc_address());
    });
    raw->engine_->UpdateCluster({.routers = RoutersOf(view),
                                 .experts = cluster::DataAddresses(view, cluster::v1::ROLE_EXPERT),
                                 .attention = cluster::DataAddresses(view, cluster::v1::ROLE_ATTENTION),
                                 .experts_elsewhere = elsewhere,
                                 .placement = std::make_shared<router::PlacementTable>(
                                     cluster::EpochOf(view), cluster::Replicas(view))});
  };
  service->client_ = registry::Join(o.registry, report, on_update, o.on_refused);
  service->watch_thread_ = std::thread([raw = service.get(), report]() mutable {
    cluster::RateMeter meter;
    while (!raw->stop_.load()) {
      const EngineStatus status = raw->engine_->status();
      const bool ready = status.connected, draining = raw->draining_.load();
      UpdateLoad(status, meter, *report.mutable_load());
      report.mutable_member()->set_ready(ready);
      report.mutable_member()->set_draining(draining);
      report.mutable_member()->set_detail(ready ? "" : "connecting to the data plane");
      raw->client_->SetReport(report);
      raw->server_->SetServing(ready && !draining);
      if (router::RouteCounters* counters = raw->engine_->route_counters()) counters->Tick(absl::Now());
      absl::SleepFor(absl::Milliseconds(50));
    }
  });
  log::Info("attention", StrCat("serving rpc=", service->self_.rpc_address(),
                                " cache_pages=", service->engine_->status().pages_total));
  return service;
}

absl::Status AttentionService::Drain(absl::Duration limit, absl::FunctionRef<bool()> give_up) {
  draining_.store(true);
  absl::Time busy = absl::Now();
  const absl::Time end = busy + limit;
  while (true) {
    absl::SleepFor(absl::Milliseconds(20));
    if (give_up()) return absl::CancelledError("asked to stop at once");
    const absl::Time now = absl::Now();
    const EngineStatus status = engine_->status();
    if (status.running + status.waiting + status.giving > 0) busy = now;
    if (now - busy >= kDrainLinger) return absl::OkStatus();
    if (now > end) {
      return absl::DeadlineExceededError(StrCat("after ", absl::FormatDuration(limit),
                                                " running=", status.running, " waiting=", status.waiting));
    }
  }
}

AttentionService::~AttentionService() {
  stop_.store(true);
  if (watch_thread_.joinable()) watch_thread_.join();
  client_.reset();
  api_.Shutdown();
  if (server_ != nullptr) server_->Shutdown(absl::Seconds(1));
  giver_.reset();  // it reads the engine's model
  if (engine_thread_.joinable()) {
    engine_->Stop();
    engine_thread_.join();
  }
}

}  // namespace minke::attention
