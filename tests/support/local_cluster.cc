#include "tests/support/local_cluster.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <map>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/cluster/row_shape.h"
#include "libs/gpu_rows/gpu_rows.h"
#include "libs/transport/testing/host_row_memory.h"
#include "libs/transport/ucx/ucx.h"
#include "tests/support/posing_model.h"

namespace minke::testing_support {

// Over inproc the nodes share one, as they share a process's device; over UCX each has its own.
transport::RowMemory* LocalCluster::MakeRows(int blocks, Device device) {
  if (blocks == 0) return nullptr;
  if (!options_.ucx && !rows_.empty()) return rows_.front().get();
  const wire::RowShape shape = RowShapeOf(checkpoint_->config(), options_.precision);
  const int32_t rows_per_block = wire::DispatchRowsMax(shape);
  if (device == Device::kCuda) {
    auto rows = MakeGpuRowMemory(shape.row_bytes(), rows_per_block, blocks);
    if (!rows.ok()) log::Error("test", rows.status().ToString());
    MK_CHECK(rows.ok());
    rows_.push_back(*std::move(rows));
  } else {
    rows_.push_back(std::make_unique<transport::HostRowMemory>(shape.row_bytes(), rows_per_block, blocks));
  }
  return rows_.back().get();
}

std::unique_ptr<transport::Transport> LocalCluster::MakeTransport(uint8_t role) {
  const transport::Identity identity{.node_id = RandomNodeId(),
                                     .role = role,
                                     .precision = options_.precision,
                                     .model_fingerprint = checkpoint_->fingerprint(),
                                     .cluster_secret = "test"};
  transport::TransportOptions options;
  if (options_.faults) options.credit_ttl = absl::Milliseconds(500);
  if (role == cluster::v1::ROLE_ATTENTION)
    options.rows = MakeRows(options_.attention_row_blocks, options_.attention_device);
  if (role == cluster::v1::ROLE_ROUTER)
    options.rows = MakeRows(options_.router_row_blocks, options_.router_device);
  if (role == cluster::v1::ROLE_EXPERT)
    options.rows = MakeRows(options_.expert_row_blocks, options_.experts_device);
  std::unique_ptr<transport::Transport> made;
  if (options_.ucx) {
    auto ucx = transport::CreateUcx(identity, {.transport = options});
    if (!ucx.ok()) log::Error("test", ucx.status().ToString());
    MK_CHECK(ucx.ok());
    made = *std::move(ucx);
  } else {
    made = transport::CreateInproc(hub_, identity, options);
  }
  const bool first_expert = role == cluster::v1::ROLE_EXPERT && experts_.empty();
  const auto& wanted = first_expert && options_.expert_faults ? options_.expert_faults : options_.faults;
  if (!wanted) return made;
  transport::FaultOptions faults = *wanted;
  faults.seed += faulty_.size();
  auto faulty = transport::CreateFaulty(std::move(made), faults);
  faulty_.push_back(faulty.get());
  return faulty;
}

namespace {

void Refused(const absl::Status& status) {
  log::Error("test", status.ToString());
  MK_CHECK(false);
}

}  // namespace

LocalCluster::LocalCluster(ClusterOptions options) : options_(std::move(options)) {
  auto checkpoint = Checkpoint::Open(options_.checkpoint);
  if (!checkpoint.ok()) log::Error("test", checkpoint.status().ToString());
  MK_CHECK(checkpoint.ok());
  checkpoint_ = *std::move(checkpoint);
  auto router = router::RouterService::Start(
      checkpoint_, MakeTransport(cluster::v1::ROLE_ROUTER),
      {.precision = options_.precision,
       .device = options_.router_device,
       .replicas = options_.replicas,
       .expert_servers = options_.experts,
       .threads = options_.threads,
       .gate_override = options_.local_routing ? nullptr : options_.gate_override});
  MK_CHECK(router.ok());
  router_ = *std::move(router);
  for (int i = 0; i < options_.experts; ++i) AddExpert();
  attention::EngineOptions engine;
  engine.limits.step_tokens_max = options_.step_tokens_max;
  engine.limits.reuse_prefixes = options_.reuse_prefixes;
  engine.cache_bytes = options_.cache_bytes;
  engine.microbatches = options_.microbatches;
  engine.exchange = options_.exchange;
  engine.page_exchange = options_.page_exchange;
  for (int i = 0; i < options_.attentions; ++i) {
    attention::AttentionServiceOptions options;
    options.registry.router = router_->rpc_address();
    options.precision = options_.precision;
    options.mla = options_.mla;
    options.device = options_.attention_device;
    options.tensor_parallel = options_.tensor_parallel;
    options.local_routing = options_.local_routing;
    options.threads = options_.threads;
    options.engine = engine;
    if (options_.local_routing) options.gate_override = options_.gate_override;
    options.on_refused = Refused;
    if (options_.attention_row_blocks > 0 && options_.attention_poses &&
        options_.attention_device == Device::kCpu) {
      options.wrap_model = [](auto model) { return std::make_unique<PosingModel>(std::move(model)); };
    }
    auto attention = attention::AttentionService::Start(
        checkpoint_, MakeTransport(cluster::v1::ROLE_ATTENTION), std::move(options));
    if (!attention.ok()) log::Error("test", attention.status().ToString());
    MK_CHECK(attention.ok());
    attentions_.push_back(*std::move(attention));
  }
  const absl::Time limit = absl::Now() + absl::Seconds(30);
  const auto ready = [&] {
    const cluster::v1::ClusterView view = router_->membership().view();
    return view.ready() &&
           std::count_if(view.members().begin(), view.members().end(), [](const auto& member) {
             return member.role() == cluster::v1::ROLE_ATTENTION && member.ready();
           }) == options_.attentions;
  };
  while (!ready()) {
    if (absl::Now() > limit)
      log::Error("test", "not ready: " + router_->membership().view().not_ready_reason());
    MK_CHECK(absl::Now() < limit);
    absl::SleepFor(absl::Milliseconds(5));
  }
}

void LocalCluster::AddExpert() {
  auto expert = experts::ExpertService::Start(checkpoint_, MakeTransport(cluster::v1::ROLE_EXPERT),
                                              {.registry = {.router = router_->rpc_address()},
                                               .precision = options_.precision,
                                               .device = options_.experts_device,
                                               .experts_format = options_.experts_format,
                                               .threads = options_.threads,
                                               .load_from = options_.load_from,
                                               .on_refused = Refused});
  if (!expert.ok()) log::Error("test", expert.status().ToString());
  MK_CHECK(expert.ok());
  experts_.push_back(*std::move(expert));
}

LocalCluster::~LocalCluster() {
  attentions_.clear();
  experts_.clear();
  router_.reset();
}

LocalCluster::RowFrames LocalCluster::row_frames() const {
  RowFrames frames;
  const auto add = [&](const transport::Transport& transport) {
    for (const transport::PeerStatistics& peer : transport.all_statistics()) {
      frames.in_row_memory += peer.frames_in_row_memory;
      frames.in_host_memory += peer.frames_in_host_memory;
    }
  };
  add(router_->engine().transport());
  for (const auto& attention : attentions_) add(attention->engine().transport());
  for (const auto& expert : experts_) add(expert->engine().transport());
  return frames;
}

int64_t LocalCluster::blocks_in_use() const {
  int64_t blocks = 0;
  for (const auto& rows : rows_) blocks += rows->bytes() / rows->block_bytes() - rows->blocks_free();
  return blocks;
}

transport::FaultCounts LocalCluster::fault_counts() const {
  transport::FaultCounts sum;
  for (const transport::FaultyTransport* faulty : faulty_) {
    const transport::FaultCounts counts = faulty->counts();
    sum.frames += counts.frames;
    sum.dropped += counts.dropped;
    sum.duplicated += counts.duplicated;
    sum.delayed += counts.delayed;
    sum.reordered += counts.reordered;
  }
  return sum;
}

std::vector<Generation> LocalCluster::Run(const std::vector<inference::v1::Submit>& requests) {
  auto stub = inference::v1::Attention::NewStub(
      grpc::CreateChannel(attention_address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
  auto stream = stub->Session(&context);
  std::vector<Generation> results(requests.size());
  for (Generation& result : results) result.error = absl::DeadlineExceededError("no end within 60 s");
  for (size_t i = 0; i < requests.size(); ++i) {
    inference::v1::GatewayMessage message;
    *message.mutable_submit() = requests[i];
    message.mutable_submit()->set_request_id(i + 1);
    stream->Write(message);
  }
  inference::v1::AttentionMessage message;
  for (size_t open = requests.size(); open > 0 && stream->Read(&message);) {
    for (const auto& event : message.events()) {
      Generation& result = results[event.request_id() - 1];
      for (const uint32_t token : event.token_ids()) result.tokens.push_back(token);
      for (const auto& logprobs : event.logprobs()) result.logprobs.push_back(logprobs.logprob());
      for (const auto& logprobs : event.prompt_logprobs())
        result.prompt_logprobs.push_back(logprobs.logprob());
      result.cached_prompt_tokens += event.cached_prompt_tokens();
      result.finish = event.finish_reason();
      if (event.finish_reason() == inference::v1::FINISH_REASON_NONE) continue;
      --open;
      result.error = event.has_error() ? absl::Status(static_cast<absl::StatusCode>(event.error().code()),
                                                      event.error().message())
                                       : absl::OkStatus();
    }
  }
  stream->WritesDone();
  (void)stream->Finish();
  return results;
}

inference::v1::Submit Greedy(const std::vector<uint32_t>& prompt, uint32_t max_tokens, bool score) {
  inference::v1::Submit submit;
  submit.mutable_prompt_token_ids()->Add(prompt.begin(), prompt.end());
  submit.mutable_sampling()->set_max_tokens(max_tokens);
  submit.mutable_sampling()->set_want_prompt_logprobs(score);
  submit.mutable_sampling()->set_want_logprobs(score);
  return submit;
}

}  // namespace minke::testing_support
