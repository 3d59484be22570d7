#include "services/gateway/gateway.h"

#include <algorithm>
#include <atomic>
#include <ctime>
#include <filesystem>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/model/config.h"
#include "libs/telemetry/process_metrics.h"
#include "proto/cluster/cluster.pb.h"
#include "services/gateway/api/grpc_api.h"
#include "services/gateway/attention_client/status_poller.h"
#include "services/gateway/cluster_view/cluster_feed.h"
#include "services/gateway/cluster_view/cluster_monitor.h"
#include "services/gateway/cluster_view/metered_pool.h"
#include "services/gateway/console/console_handler.h"
#include "services/gateway/keys/api_keys.h"
#include "services/gateway/metrics/gateway_metrics.h"
#include "services/gateway/metrics/vllm_names.h"
#include "services/gateway/openai/handler.h"

namespace minke::gateway {
namespace {

constexpr char kTag[] = "gateway";
constexpr std::chrono::milliseconds kDrainPeriod{20};

std::string FolderName(const std::string& directory) {
  std::filesystem::path path = std::filesystem::absolute(directory).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // a trailing slash
  return path.filename().string();
}

// Why there is no chat is kept for the callers; only a template named by the operator has to exist.
absl::Status ChooseChatTemplate(const std::string& directory, std::string_view name, GatewayModel* model) {
  if (!name.empty() && name != "auto") {
    MK_ASSIGN_OR_RETURN(model->chat_template, tokenizer::ParseChatTemplate(name));
    return absl::OkStatus();
  }
  const auto detected = tokenizer::DetectChatTemplate(directory);
  if (detected.ok()) {
    model->chat_template = *detected;
    return absl::OkStatus();
  }
  model->no_chat_reason =
      absl::IsNotFound(detected.status())
          ? "this checkpoint has no chat template: use /v1/completions, or serve it with --chat-template"
          : "this checkpoint's chat template is not known: serve it with --chat-template";
  if (!absl::IsNotFound(detected.status())) log::Warning(kTag, StdView(detected.status().message()));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GatewayModel> LoadGatewayModel(const std::string& checkpoint_directory,
                                              std::string_view model_name, std::string_view chat_template) {
  MK_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(checkpoint_directory));
  GatewayModel model;
  model.name = model_name.empty() ? FolderName(checkpoint_directory) : std::string(model_name);
  model.vocab_size = static_cast<uint32_t>(config.vocab_size);
  model.context_length = static_cast<uint32_t>(config.max_position_embeddings);
  model.eos_token_ids = config.eos_token_ids;
  auto loaded = tokenizer::Tokenizer::Load(checkpoint_directory);
  if (absl::IsNotFound(loaded.status())) {
    log::Info(kTag, "no tokenizer.json: prompts are arrays of token ids");
    return model;
  }
  if (!loaded.ok()) return loaded.status();
  model.tokenizer = *std::move(loaded);
  if (const auto eos = model.tokenizer->eos_id();
      eos && *eos < model.vocab_size &&
      std::count(model.eos_token_ids.begin(), model.eos_token_ids.end(), *eos) == 0) {
    model.eos_token_ids.push_back(*eos);
  }
  MK_RETURN_IF_ERROR(ChooseChatTemplate(checkpoint_directory, chat_template, &model));
  return model;
}

class Gateway::Impl {
 public:
  Impl(GatewayOptions options, GatewayModel model)
      : options_(std::move(options)),
        model_(std::move(model)),
        counters_(model_.context_length),
        admission_(options_.sequences_max),
        meter_(TrafficMeter::Clock::now()),
        monitor_(std::make_shared<ClusterMonitor>(&counters_)),
        feed_(std::make_shared<ClusterFeed>([this] { return ClusterJson(); })) {}

  ~Impl() {
    Shutdown(std::chrono::milliseconds(0));
    http_.reset();
    std::unique_ptr<GrpcApi> grpc;  // Refresh, on the pool's thread, may be looking at it
    const std::lock_guard lock(mutex_);
    grpc = std::move(grpc_);
  }

  absl::Status Start() {
    if (!options_.api_key_file.empty()) {
      MK_ASSIGN_OR_RETURN(keys_, ApiKeys::Load(options_.api_key_file, KeyKind::kApiKey));
    }
    AttentionPoolOptions attention = options_.attention;
    attention.identity = options_.cluster_identity;
    pool_ = std::make_unique<AttentionPool>(std::move(attention), &counters_, [this](bool connected) {
      pool_connected_ = connected;
      Refresh();
    });
    metered_pool_ = std::make_unique<MeteredPool>(pool_.get(), &meter_);
    tracing::TracerOptions traces = options_.traces;
    traces.service = "minke-gateway";
    traces.instance = ToString(options_.node_id);
    MK_ASSIGN_OR_RETURN(tracer_, tracing::Tracer::Start(std::move(traces)));
    recorder_ = {tracer_.get(), tracing::Sampler(options_.trace_ratio), options_.slow_request, model_.name};
    const GenerateContext context{&model_, metered_pool_.get(), &counters_, options_.silence_max, &recorder_};
    const auto not_ready_reason = [this] { return NotReadyReason(); };
    const auto refusal_reason = [this] { return RefusalReason(); };
    handler_ = std::make_unique<OpenAiHandler>(
        OpenAiHandler::Options{context, &admission_, keys_, not_ready_reason, refusal_reason,
                               [this] { return Metrics(); }, static_cast<int64_t>(std::time(nullptr))});
    MK_RETURN_IF_ERROR(MakeConsole());
    if (options_.vllm_names) poller_ = std::make_unique<StatusPoller>(options_.cluster_identity);
    std::unique_ptr<GrpcApi> grpc;
    if (!options_.grpc_listen.empty()) {
      MK_ASSIGN_OR_RETURN(grpc, GrpcApi::Start({options_.grpc_listen, context, &admission_, keys_,
                                                refusal_reason, options_.public_identity}));
    }
    HttpServerOptions http = options_.http;
    http.identity = options_.public_identity;
    MK_ASSIGN_OR_RETURN(http_, HttpServer::Start(std::move(http), console_.get()));
    {
      const std::lock_guard lock(mutex_);
      grpc_ = std::move(grpc);
      listening_ = true;
    }
    Refresh();
    return absl::OkStatus();
  }

  void OnUpdate(const cluster::v1::ClusterUpdate& update) {
    monitor_->OnUpdate(update, absl::Now());
    if (update.has_view()) TakeView(update.view());
  }

  void TakeView(const cluster::v1::ClusterView& view) {
    std::vector<AttentionNode> nodes;
    for (const cluster::v1::Member& member : view.members()) {
      if (member.role() == cluster::v1::ROLE_ATTENTION)
        nodes.push_back({member.node_id(), member.rpc_address(), member.ready(), member.draining()});
    }
    {
      const std::lock_guard lock(mutex_);
      view_ready_ = view.ready();
      view_reason_ = view.not_ready_reason().empty() ? "the cluster is not ready" : view.not_ready_reason();
    }
    pool_->UpdateNodes(nodes);
    if (poller_ != nullptr) poller_->UpdateNodes(nodes);
    Refresh();
  }

  std::string NotReadyReason() const {
    const std::lock_guard lock(mutex_);
    return ready_ ? "" : reason_;
  }

  // Why a new request is not taken; empty: it is. While a router is started again, or the units of a lost
  // expert server are loaded, the cluster is not ready, but will be in a moment.
  std::string RefusalReason() const {
    const std::lock_guard lock(mutex_);
    if (ready_) return "";
    const bool cluster_is_missing = !draining_ && (!view_ready_ || !pool_connected_);
    const bool waits =
        was_ready_ && std::chrono::steady_clock::now() - unready_since_ < options_.unready_wait;
    return cluster_is_missing && waits ? "" : reason_;
  }

  void AddMetrics(telemetry::Collector collector) {
    const std::lock_guard lock(mutex_);
    more_metrics_ = std::move(collector);
  }

  std::string Metrics() const {
    telemetry::Page page;
    telemetry::CollectProcess("gateway", ToString(options_.node_id), page);
    CollectMetrics(model_.name, counters_, page);
    page.Gauge("minke:gateway_ready", "Whether requests can be served", NotReadyReason().empty() ? 1 : 0);
    page.Gauge("minke:gateway_sequences", "Sequences held", static_cast<double>(admission_.active()));
    page.Gauge("minke:gateway_sequences_max", "Sequences held at most; above: 429",
               static_cast<double>(admission_.sequences_max()));
    page.Gauge("minke:gateway_connections", "HTTP connections", connections());
    page.Counter("minke:tls_failed_handshakes_total", "HTTP connections that got no TLS",
                 failed_handshakes());
    if (tracer_ != nullptr) tracer_->Collect(page);
    if (keys_ != nullptr) keys_->Collect(page);
    telemetry::Collector more;
    {
      const std::lock_guard lock(mutex_);
      more = more_metrics_;
    }
    if (more) more(page);
    if (poller_ != nullptr) AddVllmNames(model_.name, poller_->totals(), page);
    return telemetry::RenderText(page);
  }

  bool Drain(std::chrono::milliseconds limit, const std::function<bool()>& give_up) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    draining_ = true;
    Refresh();
    while (admission_.active() > 0 && std::chrono::steady_clock::now() < deadline && !give_up())
      std::this_thread::sleep_for(kDrainPeriod);
    return admission_.active() == 0;
  }

  void Shutdown(std::chrono::milliseconds grace) {
    feed_->Stop();  // those who watch would keep it open
    const auto deadline = std::chrono::steady_clock::now() + grace;
    if (http_ != nullptr) http_->Shutdown(grace);
    if (grpc_ != nullptr) {
      const auto left = deadline - std::chrono::steady_clock::now();
      grpc_->Shutdown(std::max(std::chrono::duration_cast<std::chrono::milliseconds>(left),
                               std::chrono::milliseconds(0)));
    }
  }

  ClusterMonitor& monitor() { return *monitor_; }
  NodeId node_id() const { return options_.node_id; }
  std::string rpc_address() const {
    return grpc_port() == 0 ? "" : StrCat(HostOf(options_.grpc_listen), ":", grpc_port());
  }
  const HttpServer& http() const { return *http_; }
  double failed_handshakes() const {
    const std::lock_guard lock(mutex_);
    return listening_ ? static_cast<double>(http_->failed_handshakes()) : 0;
  }
  int connections() const {
    const std::lock_guard lock(mutex_);
    return listening_ ? http_->connections() : 0;
  }
  int grpc_port() const { return grpc_ == nullptr ? 0 : grpc_->port(); }
  const GatewayCounters& counters() const { return counters_; }
  const Admission& admission() const { return admission_; }

 private:
  absl::Status MakeConsole() {
    ConsoleHandler::Options console{
        .next = handler_.get(), .keys = keys_, .feed = feed_, .monitor = monitor_};
    if (options_.operator_socket.empty() != options_.operator_token_file.empty()) {
      return absl::InvalidArgumentError(
          StrCat("--operator-socket and --operator-token-file: expected both or neither, found only ",
                 options_.operator_socket.empty() ? "--operator-token-file" : "--operator-socket"));
    }
    if (!options_.operator_socket.empty()) {
      MK_ASSIGN_OR_RETURN(console.operator_tokens,
                          ApiKeys::Load(options_.operator_token_file, KeyKind::kOperatorToken));
      console.operator_client = std::make_shared<OperatorClient>(options_.operator_socket);
    }
    console_ = std::make_unique<ConsoleHandler>(std::move(console));
    return absl::OkStatus();
  }

  std::string ClusterJson() {
    return ToJson(monitor_->Snapshot(absl::Now()), {.id = options_.node_id,
                                                    .version = MK_VERSION,
                                                    .model = model_.name,
                                                    .context_length = model_.context_length,
                                                    .chat = model_.chat_template.has_value(),
                                                    .registry = options_.registry,
                                                    .operated = !options_.operator_socket.empty(),
                                                    .not_ready_reason = NotReadyReason(),
                                                    .sequences = admission_.active(),
                                                    .traffic = meter_.Summarise(TrafficMeter::Clock::now())});
  }

  // Recomputes readiness; says so when it changes.
  void Refresh() {
    const std::lock_guard lock(mutex_);
    const bool ready = view_ready_ && pool_connected_ && !draining_;
    reason_ = draining_     ? "the gateway is draining"
              : view_ready_ ? "no connection to a ready attention node"
                            : view_reason_;
    if (grpc_ != nullptr) grpc_->SetServing(ready);
    if (std::exchange(ready_, ready) == ready) return;
    was_ready_ = true;
    unready_since_ = std::chrono::steady_clock::now();
    if (ready) {
      log::Info(kTag, StrCat("ready ", options_.public_identity == nullptr ? "http" : "https", "://",
                             HostOf(options_.http.listen), ":", http_ == nullptr ? 0 : http_->port()));
    } else {
      log::Warning(kTag, StrCat("not ready: ", reason_));
    }
  }

  static std::string HostOf(const std::string& listen) { return listen.substr(0, listen.rfind(':')); }

  const GatewayOptions options_;
  const GatewayModel model_;
  GatewayCounters counters_;
  std::unique_ptr<tracing::Tracer> tracer_;  // null: no traces
  RequestRecorder recorder_;
  std::shared_ptr<ApiKeys> keys_;  // shared by the edges; null: everybody may call
  Admission admission_;
  TrafficMeter meter_;
  const std::shared_ptr<ClusterMonitor> monitor_;  // shared with calls of the operator
  const std::shared_ptr<ClusterFeed> feed_;        // shared with the streams
  std::atomic<bool> pool_connected_{false}, draining_{false};
  mutable std::mutex mutex_;
  bool view_ready_ = false;                              // guarded by mutex_
  std::string view_reason_ = "waiting for the router";   // guarded by mutex_
  bool ready_ = false;                                   // guarded by mutex_
  bool was_ready_ = false;                               // guarded by mutex_
  std::chrono::steady_clock::time_point unready_since_;  // guarded by mutex_; while !ready_ && was_ready_
  std::string reason_ = "waiting for the router";        // guarded by mutex_
  telemetry::Collector more_metrics_;                    // guarded by mutex_
  bool listening_ = false;                               // guarded by mutex_; http_ is there
  // Destroyed bottom up: the servers first, then the pool they use.
  std::unique_ptr<StatusPoller> poller_;  // null: nobody asks for the cluster's load
  std::unique_ptr<AttentionPool> pool_;
  std::unique_ptr<MeteredPool> metered_pool_;
  std::unique_ptr<OpenAiHandler> handler_;
  std::unique_ptr<ConsoleHandler> console_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<GrpcApi> grpc_;  // set once, under mutex_
};

Gateway::Gateway(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Gateway::~Gateway() { Shutdown(std::chrono::milliseconds(0)); }
void Gateway::AddMetrics(telemetry::Collector collector) { impl_->AddMetrics(std::move(collector)); }
void Gateway::OnUpdate(const cluster::v1::ClusterUpdate& update) { impl_->OnUpdate(update); }
void Gateway::SetRegistryConnected(bool connected) {
  impl_->monitor().SetRegistryConnected(connected, absl::Now());
}
void Gateway::UpdateView(const cluster::v1::ClusterView& view) {
  cluster::v1::ClusterUpdate update;
  *update.mutable_view() = view;
  impl_->OnUpdate(update);
}
NodeId Gateway::node_id() const { return impl_->node_id(); }
std::string Gateway::rpc_address() const { return impl_->rpc_address(); }
int Gateway::port() const { return impl_->http().port(); }
int Gateway::grpc_port() const { return impl_->grpc_port(); }
std::string Gateway::not_ready_reason() const { return impl_->NotReadyReason(); }
const GatewayCounters& Gateway::counters() const { return impl_->counters(); }
int64_t Gateway::active_sequences() const { return impl_->admission().active(); }
int Gateway::connections() const { return impl_->connections(); }
bool Gateway::Drain(std::chrono::milliseconds limit, const std::function<bool()>& give_up) {
  return impl_->Drain(limit, give_up);
}
void Gateway::Shutdown(std::chrono::milliseconds grace) { impl_->Shutdown(grace); }

absl::StatusOr<std::unique_ptr<Gateway>> Gateway::Create(GatewayOptions options, GatewayModel model) {
  auto impl = std::make_unique<Impl>(std::move(options), std::move(model));
  MK_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<Gateway>(new Gateway(std::move(impl)));
}

}  // namespace minke::gateway
