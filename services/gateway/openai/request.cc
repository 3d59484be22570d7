#include "services/gateway/openai/request.h"

#include <algorithm>
#include <utility>

#include "libs/base/json_depth.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"
#include "services/gateway/openai/request_fields.h"

namespace minke::gateway {
namespace {

using nlohmann::json;

// OpenAI's default for /v1/completions; chat goes on to the end of the context.
constexpr uint64_t kCompletionMaxTokens = 16;
constexpr int64_t kChoicesMax = 128;

std::variant<json, ApiError> ParseBody(std::string_view body) {
  if (NestsTooDeep(body))
    return BadField("", StrCat("the body nests deeper than ", kJsonDepthMax, " levels"));
  try {
    json value = json::parse(body);
    if (!value.is_object())
      return BadField("", StrCat("the body: expected a JSON object, found ", Describe(value)));
    return value;
  } catch (const json::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..." and the text around it.
    std::string what = error.what();
    if (const size_t bracket = what.find("] "); bracket != std::string::npos) what.erase(0, bracket + 2);
    // The message quotes the input, which need not be UTF-8; ErrorBody replaces what is not.
    if (what.size() > 200) what = StrCat(what.substr(0, 200), "...");
    return BadField("", StrCat("the body is not valid JSON: ", what));
  }
}

// Options of OpenAI's API that change what is generated and are not supported: ignoring them would be a wrong
// answer.
void RefuseUnsupported(Endpoint endpoint, RequestFields* fields) {
  for (const char* name : {"tools", "functions"}) {
    const json* value = fields->Find(name);
    if (value != nullptr && !(value->is_array() && value->empty()))
      fields->Fail(name, StrCat(name, " are not supported"));
  }
  for (const char* name : {"tool_choice", "function_call"}) {
    const json* value = fields->Find(name);
    if (value != nullptr && *value != "none" && *value != "auto") {
      fields->Fail(name, StrCat(name, " is not supported"));
    }
  }
  if (const json* format = fields->Find("response_format")) {
    if (!format->is_object() || format->value("type", json()) != "text") {
      fields->Fail("response_format", "response_format: only {\"type\": \"text\"} is supported");
    }
  }
  if (endpoint == Endpoint::kCompletions) {
    const json* suffix = fields->Find("suffix");
    if (suffix != nullptr && *suffix != "") fields->Fail("suffix", "suffix is not supported");
  } else {
    for (const char* name : {"audio", "prediction", "web_search_options"}) {
      if (fields->Find(name) != nullptr) fields->Fail(name, StrCat(name, " is not supported"));
    }
    const json* modalities = fields->Find("modalities");
    if (modalities != nullptr && *modalities != json::array({"text"})) {
      fields->Fail("modalities", "modalities: only [\"text\"] is supported");
    }
  }
}

void ReadLogitBias(uint32_t vocab_size, RequestFields* fields, Sampling* sampling) {
  const json* value = fields->Find("logit_bias");
  if (value == nullptr) return;
  if (!value->is_object())
    return fields->Expected("logit_bias", "an object of token ids and numbers", *value);
  for (const auto& [key, bias] : value->items()) {
    const bool digits =
        !key.empty() && key.size() < 10 && key.find_first_not_of("0123456789") == std::string::npos;
    if (!digits || std::stoul(key) >= vocab_size) {
      return fields->Fail("logit_bias", StrCat("logit_bias: expected token ids from 0 to ", vocab_size - 1,
                                               " as keys, found \"", key.substr(0, 40), "\""));
    }
    if (!bias.is_number()) return fields->Expected("logit_bias", "numbers as values", bias);
    sampling->logit_bias.emplace_back(std::stoul(key), static_cast<float>(bias.get<double>()));
  }
}

void ReadStops(RequestFields* fields, std::vector<std::string>* stops) {
  const json* value = fields->Find("stop");
  if (value == nullptr) return;
  if (value->is_string()) {
    stops->push_back(value->get<std::string>());
    return;
  }
  if (!value->is_array()) return fields->Expected("stop", "a string or an array of strings", *value);
  if (value->size() > kStopStringsMax) {
    return fields->Fail(
        "stop", StrCat("stop: expected at most ", kStopStringsMax, " strings, found ", value->size()));
  }
  for (const json& one : *value) {
    if (!one.is_string()) return fields->Expected("stop", "strings", one);
    stops->push_back(one.get<std::string>());
  }
}

void ReadLogprobs(Endpoint endpoint, RequestFields* fields, Sampling* sampling) {
  std::optional<int64_t> count;
  if (endpoint == Endpoint::kCompletions) {
    fields->Integer("logprobs", &count);
  } else {
    bool wanted = false;
    fields->Bool("logprobs", &wanted);
    std::optional<int64_t> top;
    fields->Integer("top_logprobs", &top);
    if (top && !wanted) fields->Fail("top_logprobs", "top_logprobs needs logprobs to be true");
    if (wanted) count = top.value_or(0);
  }
  if (!count) return;
  if (*count < 0 || *count > kTopLogprobsMax) {
    const char* name = endpoint == Endpoint::kCompletions ? "logprobs" : "top_logprobs";
    fields->Fail(name, StrCat(name, ": expected 0 to ", kTopLogprobsMax, ", found ", *count));
    return;
  }
  sampling->logprobs = static_cast<uint32_t>(*count);
}

void ReadSampling(const GatewayModel& model, RequestFields* fields, Sampling* sampling) {
  fields->Number("temperature", &sampling->temperature);
  fields->Number("top_p", &sampling->top_p);
  fields->Number("min_p", &sampling->min_p);
  fields->Number("presence_penalty", &sampling->presence_penalty);
  fields->Number("frequency_penalty", &sampling->frequency_penalty);
  fields->Number("repetition_penalty", &sampling->repetition_penalty);
  std::optional<int64_t> top_k;
  fields->Integer("top_k", &top_k);
  if (top_k && *top_k < -1)
    fields->Fail("top_k", StrCat("top_k: expected -1 (off), 0 (off) or more, found ", *top_k));
  if (top_k && *top_k > 0)
    sampling->top_k = static_cast<uint32_t>(std::min<int64_t>(*top_k, model.vocab_size));
  std::optional<int64_t> seed;
  fields->Integer("seed", &seed);
  sampling->seed = seed ? static_cast<uint64_t>(*seed) : RandomSeed();
  ReadLogitBias(model.vocab_size, fields, sampling);
  fields->TokenIdList("stop_token_ids", model.vocab_size, &sampling->stop_token_ids);
  bool ignore_eos = false;
  fields->Bool("ignore_eos", &ignore_eos);
  if (!ignore_eos) AddEndOfSequence(model, sampling);
}

void ReadChoices(RequestFields* fields, uint32_t* n) {
  std::optional<int64_t> choices, best_of;
  fields->Integer("n", &choices);
  fields->Integer("best_of", &best_of);
  if (choices && (*choices < 1 || *choices > kChoicesMax)) {
    fields->Fail("n", StrCat("n: expected 1 to ", kChoicesMax, ", found ", *choices));
  }
  if (best_of && *best_of != choices.value_or(1)) {
    fields->Fail("best_of", StrCat("best_of: only the value of n is supported, found ", *best_of));
  }
  if (choices && !fields->failed()) *n = static_cast<uint32_t>(*choices);
}

void ReadStreamOptions(RequestFields* fields, GenerateRequest* request) {
  fields->Bool("stream", &request->stream);
  const json* options = fields->Find("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) return fields->Expected("stream_options", "an object", *options);
  if (!request->stream) return fields->Fail("stream_options", "stream_options needs stream to be true");
  const json usage = options->value("include_usage", json());
  if (usage.is_null()) return;
  if (!usage.is_boolean())
    return fields->Expected("stream_options", "include_usage to be true or false", usage);
  request->include_usage = usage.get<bool>();
}

void ReadTimeout(RequestFields* fields, float* timeout_s) {
  if (fields->Find("timeout_s") == nullptr) return;
  fields->Number("timeout_s", timeout_s);
  if (!fields->failed() && !(*timeout_s > 0 && *timeout_s <= kTimeoutSecondsMax)) {
    fields->Fail("timeout_s", StrCat("timeout_s: expected more than 0 and at most ", kTimeoutSecondsMax,
                                     ", found ", *timeout_s));
  }
}

// The text of one prompt or its ids, whichever it is; appends to `request`.
void AddPrompt(const json& prompt, const GatewayModel& model, RequestFields* fields,
               GenerateRequest* request) {
  PreparedPrompt prepared;
  TokenIds ids;
  if (prompt.is_string()) {
    const auto& text = prompt.get_ref<const std::string&>();
    if (text.empty())
      return fields->Fail("prompt", "prompt: expected text or token ids, found an empty prompt");
    auto encoded = EncodePrompt(text, model);
    if (auto* error = std::get_if<ApiError>(&encoded)) return fields->Fail("prompt", error->message);
    ids = std::get<TokenIds>(std::move(encoded));
    if (request->echo) prepared.echo_text = text;
  } else {
    if (const auto problem = ReadTokenIds(prompt, model.vocab_size, &ids))
      return fields->Fail("prompt", StrCat("prompt: ", *problem));
    if (ids.empty())
      return fields->Fail("prompt", "prompt: expected text or token ids, found an empty prompt");
    if (request->echo && model.tokenizer != nullptr) {
      tokenizer::StreamingDecoder decoder(*model.tokenizer);
      for (const uint32_t id : ids) prepared.echo_text += decoder.Push(id);
      prepared.echo_text += decoder.Finish();
    }
  }
  prepared.ids = std::make_shared<const TokenIds>(std::move(ids));
  request->prompts.push_back(std::move(prepared));
}

void ReadPrompts(const GatewayModel& model, RequestFields* fields, GenerateRequest* request) {
  const json* prompt = fields->Find("prompt");
  if (prompt == nullptr) return fields->Fail("prompt", "prompt: expected text or token ids, found nothing");
  const bool is_list = prompt->is_array() && !prompt->empty() && !(*prompt)[0].is_number();
  if (!is_list) return AddPrompt(*prompt, model, fields, request);
  if (prompt->size() * request->n > kSequencesPerRequestMax) {
    return fields->Fail("prompt",
                        StrCat("prompt: expected at most ", kSequencesPerRequestMax,
                               " sequences (prompts times n), found ", prompt->size() * request->n));
  }
  for (const json& one : *prompt) {
    if (one.is_string() != (*prompt)[0].is_string() || !(one.is_string() || one.is_array())) {
      return fields->Fail("prompt", StrCat("prompt: expected a list of strings or of token-id arrays, found ",
                                           Describe(one)));
    }
    AddPrompt(one, model, fields, request);
    if (fields->failed()) return;
  }
}

// A string, or an array of parts of which only text is supported.
std::optional<std::string> MessageText(const json& content) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return std::nullopt;
  std::string text;
  for (const json& part : content) {
    if (!part.is_object() || part.value("type", json()) != "text" || !part.contains("text") ||
        !part["text"].is_string()) {
      return std::nullopt;
    }
    text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

void ReadMessages(const GatewayModel& model, RequestFields* fields, GenerateRequest* request) {
  const json* list = fields->Find("messages");
  if (list == nullptr)
    return fields->Fail("messages", "messages: expected an array of messages, found nothing");
  if (!list->is_array() || list->empty()) {
    return fields->Fail("messages", "messages: expected a non-empty array of messages");
  }
  std::vector<tokenizer::ChatMessage> messages;
  for (size_t i = 0; i < list->size(); ++i) {
    const json& message = (*list)[i];
    const std::string where = StrCat("messages[", i, "]");
    if (!message.is_object() || !message.contains("role") || !message["role"].is_string()) {
      return fields->Fail("messages", StrCat(where, ": expected an object with a role"));
    }
    std::string role = message["role"].get<std::string>();
    if (role == "developer") role = "system";  // its newer name
    if (role != "system" && role != "user" && role != "assistant") {
      return fields->Fail("messages",
                          StrCat(where, ".role: expected system, developer, user or assistant, found \"",
                                 role.substr(0, 40), "\""));
    }
    const json content = message.value("content", json());
    std::optional<std::string> text = MessageText(content);
    if (!text && content.is_null() && role == "assistant") text = "";
    if (!text) {
      return fields->Fail(
          "messages",
          StrCat(where, ".content: expected a string or an array of text parts, found ", Describe(content)));
    }
    messages.push_back({std::move(role), *std::move(text)});
  }
  auto encoded = EncodeChat(messages, model);
  if (auto* error = std::get_if<ApiError>(&encoded)) return fields->Fail("messages", error->message);
  request->prompts.push_back({std::make_shared<const TokenIds>(std::get<TokenIds>(std::move(encoded))), ""});
}

// max_tokens, or for chat also its newer name; checked against every prompt.
void ReadMaxTokens(const GatewayModel& model, RequestFields* fields, GenerateRequest* request) {
  const bool chat = request->endpoint == Endpoint::kChat;
  const char* name =
      chat && fields->Find("max_completion_tokens") != nullptr ? "max_completion_tokens" : "max_tokens";
  std::optional<int64_t> value;
  fields->Integer(name, &value);
  if (value && *value < 0) fields->Fail(name, StrCat(name, ": expected 0 or more, found ", *value));
  if (fields->failed()) return;
  const char* prompt_field = chat ? "messages" : "prompt";
  uint64_t room = model.context_length;
  for (const PreparedPrompt& prompt : request->prompts) {
    // Without a limit of the caller's own at least one token has to fit.
    const auto wanted = static_cast<uint64_t>(value.value_or(1));
    if (auto error = CheckLength(prompt.ids->size(), wanted, model, prompt_field, name)) {
      fields->error() = std::move(error);
      return;
    }
    room = std::min<uint64_t>(room, model.context_length - prompt.ids->size());
  }
  const uint64_t fallback = chat ? room : std::min(room, kCompletionMaxTokens);
  request->sampling.max_tokens = static_cast<uint32_t>(value ? static_cast<uint64_t>(*value) : fallback);
}

}  // namespace

std::variant<GenerateRequest, ApiError> ParseRequest(Endpoint endpoint, std::string_view body,
                                                     const GatewayModel& model) {
  auto parsed = ParseBody(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  const json& object = std::get<json>(parsed);
  RequestFields fields(object);
  GenerateRequest request;
  request.endpoint = endpoint;

  std::string name = model.name;
  fields.String("model", &name);
  if (!fields.failed() && name != model.name) {
    return ApiError{404,
                    StrCat("the model \"", name.substr(0, 200), "\" does not exist; this server has \"",
                           model.name, "\""),
                    "model", "model_not_found", 0};
  }
  RefuseUnsupported(endpoint, &fields);
  ReadChoices(&fields, &request.n);
  ReadStreamOptions(&fields, &request);
  if (endpoint == Endpoint::kCompletions) fields.Bool("echo", &request.echo);
  fields.Bool("return_token_ids", &request.return_token_ids);
  ReadTimeout(&fields, &request.timeout_s);
  ReadStops(&fields, &request.stops);
  ReadLogprobs(endpoint, &fields, &request.sampling);
  request.sampling.prompt_logprobs = request.echo && request.sampling.logprobs.has_value();
  ReadSampling(model, &fields, &request.sampling);
  if (fields.failed()) return *std::move(fields.error());
  if (auto error = CheckSampling(request.sampling, model)) return *std::move(error);
  if (auto error = CheckStops(request.stops, model)) return *std::move(error);
  // Last, because it is what takes time.
  if (endpoint == Endpoint::kCompletions) {
    ReadPrompts(model, &fields, &request);
  } else {
    ReadMessages(model, &fields, &request);
  }
  if (!fields.failed()) ReadMaxTokens(model, &fields, &request);
  if (fields.failed()) return *std::move(fields.error());
  return request;
}

}  // namespace minke::gateway
