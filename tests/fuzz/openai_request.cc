// Bodies of /v1/completions and /v1/chat/completions, down to token ids. The first byte chooses the endpoint
// and the model; the rest is the body. What is accepted keeps every limit; what is refused says why in valid
// JSON.
#include <cmath>
#include <memory>

#include "libs/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"
#include "services/gateway/openai/request.h"
#include "tests/fuzz/fuzz.h"

namespace minke::gateway {
namespace {

// By text and chat, or by token ids only.
const GatewayModel& Model(bool text) {
  static const GatewayModel with_text = [] {
    auto loaded = tokenizer::Tokenizer::Load("libs/tokenizer/testdata/deepseek_style");
    FUZZ_ASSERT(loaded.ok());
    GatewayModel model;
    model.name = "small";
    model.tokenizer = *std::move(loaded);
    model.chat_template = tokenizer::ChatTemplate::kV2Chat;
    model.vocab_size = model.tokenizer->id_end();
    model.context_length = 2048;
    model.eos_token_ids = {1};
    return model;
  }();
  static const GatewayModel ids_only = [] {
    GatewayModel model;
    model.name = "small";
    model.no_chat_reason = "the checkpoint has no tokenizer";
    model.vocab_size = 512;
    model.context_length = 100;
    model.eos_token_ids = {1};
    return model;
  }();
  return text ? with_text : ids_only;
}

bool Between(float value, float least, float most) { return value >= least && value <= most; }

void CheckAccepted(const GenerateRequest& request, const GatewayModel& model) {
  FUZZ_ASSERT(!request.prompts.empty() && request.n >= 1);
  FUZZ_ASSERT(request.num_sequences() <= kSequencesPerRequestMax);
  for (const PreparedPrompt& prompt : request.prompts) {
    FUZZ_ASSERT(prompt.ids != nullptr && !prompt.ids->empty());
    FUZZ_ASSERT(prompt.ids->size() + request.sampling.max_tokens <= model.context_length);
    for (const uint32_t id : *prompt.ids) FUZZ_ASSERT(id < model.vocab_size);
    FUZZ_ASSERT(fuzz::IsUtf8(prompt.echo_text));
    FUZZ_ASSERT(request.echo || prompt.echo_text.empty());
  }
  FUZZ_ASSERT(request.stops.size() <= kStopStringsMax);
  for (const std::string& stop : request.stops)
    FUZZ_ASSERT(!stop.empty() && stop.size() <= kStopStringBytesMax && fuzz::IsUtf8(stop));
  FUZZ_ASSERT(Between(request.timeout_s, 0, kTimeoutSecondsMax));
  const Sampling& s = request.sampling;
  FUZZ_ASSERT(Between(s.temperature, 0, 2) && Between(s.top_p, 0, 1) && Between(s.min_p, 0, 1));
  FUZZ_ASSERT(Between(s.presence_penalty, -2, 2) && Between(s.frequency_penalty, -2, 2));
  FUZZ_ASSERT(s.repetition_penalty > 0 && std::isfinite(s.repetition_penalty));
  FUZZ_ASSERT(s.top_k <= model.vocab_size);
  FUZZ_ASSERT(!s.logprobs || *s.logprobs <= kTopLogprobsMax);
  for (const auto& [id, bias] : s.logit_bias) FUZZ_ASSERT(id < model.vocab_size && std::isfinite(bias));
  for (const uint32_t id : s.stop_token_ids) FUZZ_ASSERT(id < model.vocab_size);
}

void CheckRefused(const ApiError& error) {
  FUZZ_ASSERT(error.http_status >= 400 && error.http_status < 500);
  FUZZ_ASSERT(!error.message.empty() && error.message.size() < 4096);
  const std::string body = ErrorBody(error);
  FUZZ_ASSERT(fuzz::IsUtf8(body));
  const auto json = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  FUZZ_ASSERT(json.is_object() && json["error"]["message"].is_string());
}

}  // namespace
}  // namespace minke::gateway

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace minke::gateway;
  minke::fuzz::Input input(data, bytes);
  const auto choice = input.Take<uint8_t>();
  const GatewayModel& model = Model((choice & 2) == 0);
  const auto parsed =
      ParseRequest((choice & 1) == 0 ? Endpoint::kCompletions : Endpoint::kChat, input.rest(), model);
  if (const auto* request = std::get_if<GenerateRequest>(&parsed)) {
    CheckAccepted(*request, model);
  } else {
    CheckRefused(std::get<ApiError>(parsed));
  }
  return 0;
}
