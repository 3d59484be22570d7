#include "services/gateway/api/grpc_api.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <mutex>
#include <utility>

#include "absl/strings/str_format.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/rpc/credentials.h"
#include "proto/inference/inference.grpc.pb.h"
#include "services/gateway/api/generate_reactor.h"
#include "services/gateway/openai/request.h"

namespace minke::gateway {
namespace {

namespace v1 = inference::v1;

grpc::Status ToGrpc(const ApiError& error) {
  const absl::Status status = ToStatus(error);
  return {static_cast<grpc::StatusCode>(status.code()),
          std::string(status.message().data(), status.message().size())};
}

Sampling FromProto(const v1::SamplingParams& proto, bool ignore_eos, const GatewayModel& model) {
  Sampling sampling;
  sampling.temperature = proto.temperature();
  sampling.top_p = proto.top_p() == 0 ? 1 : proto.top_p();  // unset
  sampling.top_k = proto.top_k();
  sampling.min_p = proto.min_p();
  sampling.presence_penalty = proto.presence_penalty();
  sampling.frequency_penalty = proto.frequency_penalty();
  sampling.repetition_penalty = proto.repetition_penalty() == 0 ? 1 : proto.repetition_penalty();
  sampling.seed = proto.seed();
  for (const v1::LogitBias& entry : proto.logit_bias())
    sampling.logit_bias.emplace_back(entry.token_id(), entry.bias());
  sampling.stop_token_ids.assign(proto.stop_token_ids().begin(), proto.stop_token_ids().end());
  sampling.max_tokens = proto.max_tokens();
  if (proto.want_logprobs() || proto.want_prompt_logprobs()) {
    sampling.logprobs = std::max(proto.top_logprobs(), proto.top_prompt_logprobs());
  }
  sampling.prompt_logprobs = proto.want_prompt_logprobs();
  if (!ignore_eos) AddEndOfSequence(model, &sampling);
  return sampling;
}

// Empty if the caller sent none of that name.
std::string Metadata(const grpc::CallbackServerContext& context, const char* name) {
  const auto found = context.client_metadata().find(name);
  if (found == context.client_metadata().end()) return "";
  return {found->second.data(), found->second.size()};
}

std::variant<TokenIds, ApiError> PromptOf(const v1::GenerateRequest& request, const GatewayModel& model) {
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      if (request.text().empty()) return BadField("text", "expected a prompt, found an empty one");
      return EncodePrompt(request.text(), model);
    case v1::GenerateRequest::kTokenIds: {
      TokenIds ids(request.token_ids().ids().begin(), request.token_ids().ids().end());
      if (ids.empty()) return BadField("token_ids", "expected a prompt, found an empty one");
      for (const uint32_t id : ids) {
        if (id >= model.vocab_size) {
          return BadField("token_ids",
                          StrCat("expected token ids from 0 to ", model.vocab_size - 1, ", found ", id));
        }
      }
      return ids;
    }
    case v1::GenerateRequest::kChat: {
      std::vector<tokenizer::ChatMessage> messages;
      for (const v1::ChatMessage& message : request.chat().messages())
        messages.push_back({message.role(), message.content()});
      return EncodeChat(messages, model);
    }
    case v1::GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  return BadField("prompt", "expected text, token_ids or chat, found nothing");
}

}  // namespace

class GrpcApi::Impl final : public v1::Inference::CallbackService {
 public:
  explicit Impl(Options options) : options_(std::move(options)) {}

  absl::Status Start() {
    static std::once_flag plugins;  // gRPC keeps them for the process
    std::call_once(plugins, [] {
      grpc::EnableDefaultHealthCheckService(true);
      grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    });
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error
    builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, rpc::kHandshakeTimeoutMs);
    builder.AddListeningPort(options_.listen, credentials_, &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port_ == 0) {
      return absl::FailedPreconditionError(
          StrCat("cannot listen on ", options_.listen, " (gRPC): is the port in use?"));
    }
    SetServing(false);
    return absl::OkStatus();
  }

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override {
    const auto arrived = std::chrono::steady_clock::now();
    const GatewayModel& model = *options_.context.model;
    const auto refuse = [](const ApiError& error) { return new GenerateReactor(ToGrpc(error)); };
    std::shared_ptr<KeyAccount> account;
    if (options_.keys != nullptr &&
        (account = options_.keys->Find(Metadata(*context, "authorization"))) == nullptr) {
      return refuse({401, "an API key is needed: send the metadata authorization: Bearer KEY", "", "", 0});
    }
    if (!request->model().empty() && request->model() != model.name) {
      return refuse(
          {404, StrCat("the model does not exist; this server has \"", model.name, "\""), "model", "", 0});
    }
    if (const std::string reason = options_.refusal_reason(); !reason.empty()) {
      return refuse({503, StrCat("not ready: ", reason), "", "", 0});
    }
    GenerateReactor::Request generate;
    generate.sampling = FromProto(request->sampling(), request->ignore_eos(), model);
    generate.stops.assign(request->stop().begin(), request->stop().end());
    if (const auto error = CheckSampling(generate.sampling, model)) return refuse(*error);
    if (const auto error = CheckStops(generate.stops, model)) return refuse(*error);
    auto prompt = PromptOf(*request, model);
    if (const auto* error = std::get_if<ApiError>(&prompt)) return refuse(*error);
    generate.prompt = std::make_shared<const TokenIds>(std::get<TokenIds>(std::move(prompt)));
    if (const auto error = CheckLength(generate.prompt->size(), generate.sampling.max_tokens, model, "prompt",
                                       "max_tokens")) {
      return refuse(*error);
    }
    const std::string request_id = absl::StrFormat("grpc-%016x", RandomSeed());
    generate.facts = {.request_id = request_id,
                      .response_id = request_id,
                      .traceparent = Metadata(*context, "traceparent"),
                      .operation = request->has_chat() ? "chat" : "text_completion",
                      .route = "/minke.inference.v1.Inference/Generate",
                      .arrived = arrived,
                      .stream = true,
                      .prompt_tokens = generate.prompt->size(),
                      .temperature = generate.sampling.temperature,
                      .top_p = generate.sampling.top_p,
                      .max_tokens = generate.sampling.max_tokens};
    // gRPC ends the call by itself then; the cluster is to know beforehand.
    if (const auto deadline = context->deadline(); deadline != std::chrono::system_clock::time_point::max()) {
      const auto left = std::clamp<std::chrono::system_clock::duration>(
          deadline - std::chrono::system_clock::now(), std::chrono::milliseconds(1),
          std::chrono::seconds(kTimeoutSecondsMax));
      generate.deadline = std::chrono::steady_clock::now() + left;
    }
    Admission::Permit permit = options_.admission->TryAcquire(1);
    if (!permit) {
      options_.context.counters->generations_refused.fetch_add(1);
      return refuse({429, "the server is full; try again later", "", "", 0});
    }
    KeyAccount::Permit key_permit;
    if (account != nullptr) {
      auto begun = account->Begin(1, generate.prompt->size(), KeyAccount::Clock::now());
      if (const auto* refusal = std::get_if<KeyRefusal>(&begun))
        return refuse({429, refusal->message, "", "", 0});
      key_permit = std::get<KeyAccount::Permit>(std::move(begun));
    }
    return new GenerateReactor(options_.context, std::move(generate), std::move(permit),
                               std::move(key_permit));
  }

  void SetServing(bool serving) {
    if (auto* health = server_->GetHealthCheckService()) health->SetServingStatus(serving);
  }
  void Shutdown(std::chrono::milliseconds grace) {
    if (server_ == nullptr || std::exchange(shut_down_, true)) return;
    server_->Shutdown(std::chrono::system_clock::now() + grace);
    server_->Wait();
  }
  int port() const { return port_; }

 private:
  const Options options_;
  // Asked by the server as long as it lives.
  const std::shared_ptr<grpc::ServerCredentials> credentials_ = rpc::MakeServerCredentials(options_.identity);
  int port_ = 0;
  bool shut_down_ = false;
  std::unique_ptr<grpc::Server> server_;
};

GrpcApi::GrpcApi(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
GrpcApi::~GrpcApi() { Shutdown(std::chrono::milliseconds(0)); }
int GrpcApi::port() const { return impl_->port(); }
void GrpcApi::SetServing(bool serving) { impl_->SetServing(serving); }
void GrpcApi::Shutdown(std::chrono::milliseconds grace) { impl_->Shutdown(grace); }

absl::StatusOr<std::unique_ptr<GrpcApi>> GrpcApi::Start(Options options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  MK_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<GrpcApi>(new GrpcApi(std::move(impl)));
}

}  // namespace minke::gateway
