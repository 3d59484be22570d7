// The part of request.h that every edge shares: ranges, lengths, prompts to token ids.
#include <algorithm>
#include <cmath>
#include <random>

#include "libs/base/strings.h"
#include "services/gateway/openai/request.h"

namespace minke::gateway {
namespace {

struct Range {
  const char* name;
  float value;
  bool holds;
  const char* expected;
};

// What was read wrong is the caller's fault; what the tokenizer cannot do for any text is said the same way.
ApiError EncodeError(const absl::Status& status) {
  return {400, std::string(StdView(status.message())), "", "", 0};
}

}  // namespace

std::optional<ApiError> CheckSampling(const Sampling& s, const GatewayModel& model) {
  const auto within = [](float value, float low, float high) {
    return value >= low && value <= high;
  };  // false for NaN
  const Range ranges[] = {
      {"temperature", s.temperature, within(s.temperature, 0, 2), "0 to 2"},
      {"top_p", s.top_p, s.top_p > 0 && s.top_p <= 1, "more than 0, at most 1"},
      {"min_p", s.min_p, s.min_p >= 0 && s.min_p < 1, "0 to less than 1"},
      {"presence_penalty", s.presence_penalty, within(s.presence_penalty, -2, 2), "-2 to 2"},
      {"frequency_penalty", s.frequency_penalty, within(s.frequency_penalty, -2, 2), "-2 to 2"},
      {"repetition_penalty", s.repetition_penalty,
       s.repetition_penalty > 0 && std::isfinite(s.repetition_penalty), "more than 0"},
  };
  for (const Range& range : ranges) {
    if (!range.holds)
      return BadField(range.name, StrCat(range.name, ": expected ", range.expected, ", found ", range.value));
  }
  for (const auto& [id, bias] : s.logit_bias) {
    if (id >= model.vocab_size) {
      return BadField("logit_bias", StrCat("logit_bias: expected token ids from 0 to ", model.vocab_size - 1,
                                           ", found ", id));
    }
    if (!within(bias, -100, 100)) {
      return BadField("logit_bias",
                      StrCat("logit_bias: expected -100 to 100, found ", bias, " for token ", id));
    }
  }
  for (const uint32_t id : s.stop_token_ids) {
    if (id >= model.vocab_size) {
      return BadField("stop_token_ids", StrCat("stop_token_ids: expected token ids from 0 to ",
                                               model.vocab_size - 1, ", found ", id));
    }
  }
  if (s.logprobs && *s.logprobs > kTopLogprobsMax) {
    return BadField("logprobs", StrCat("logprobs: expected 0 to ", kTopLogprobsMax, ", found ", *s.logprobs));
  }
  return std::nullopt;
}

std::optional<ApiError> CheckStops(const std::vector<std::string>& stops, const GatewayModel& model) {
  if (stops.empty()) return std::nullopt;
  if (stops.size() > kStopStringsMax) {
    return BadField("stop",
                    StrCat("stop: expected at most ", kStopStringsMax, " strings, found ", stops.size()));
  }
  for (const std::string& stop : stops) {
    if (stop.empty() || stop.size() > kStopStringBytesMax) {
      return BadField("stop", StrCat("stop: expected strings of 1 to ", kStopStringBytesMax, " bytes, found ",
                                     stop.size()));
    }
  }
  if (model.tokenizer == nullptr) {
    return BadField(
        "stop", "stop: this checkpoint has no tokenizer, so there is no text to stop at; use stop_token_ids");
  }
  return std::nullopt;
}

std::optional<ApiError> CheckLength(size_t prompt_tokens, uint64_t max_tokens, const GatewayModel& model,
                                    std::string_view prompt_field, std::string_view max_tokens_field) {
  if (prompt_tokens <= model.context_length && max_tokens <= model.context_length - prompt_tokens)
    return std::nullopt;
  const std::string message =
      StrCat("this model's context is ", model.context_length, " tokens; the request has ", prompt_tokens,
             " in ", prompt_field, " and ", max_tokens, " in ", max_tokens_field);
  return BadField(prompt_tokens > model.context_length ? prompt_field : max_tokens_field, message,
                  "context_length_exceeded");
}

std::variant<TokenIds, ApiError> EncodePrompt(std::string_view text, const GatewayModel& model) {
  if (model.tokenizer == nullptr) {
    return BadField("prompt", "this checkpoint has no tokenizer: send the prompt as an array of token ids");
  }
  auto ids = model.tokenizer->Encode(text);
  if (!ids.ok()) return EncodeError(ids.status());
  if (model.tokenizer->add_bos()) ids->insert(ids->begin(), *model.tokenizer->bos_id());
  for (const uint32_t id : *ids) {
    if (id >= model.vocab_size) {
      return BadField("prompt", StrCat("the tokenizer gives id ", id,
                                       ", which is outside the model's vocabulary of ", model.vocab_size));
    }
  }
  return *std::move(ids);
}

std::variant<TokenIds, ApiError> EncodeChat(const std::vector<tokenizer::ChatMessage>& messages,
                                            const GatewayModel& model) {
  if (model.tokenizer == nullptr) {
    return BadField("messages",
                    "this checkpoint has no tokenizer: use /v1/completions with an array of token ids");
  }
  if (!model.chat_template) return BadField("messages", model.no_chat_reason);
  auto ids = tokenizer::RenderChat(*model.tokenizer, *model.chat_template, messages);
  if (!ids.ok()) return EncodeError(ids.status());
  return *std::move(ids);
}

void AddEndOfSequence(const GatewayModel& model, Sampling* sampling) {
  TokenIds& ids = sampling->stop_token_ids;
  for (const uint32_t id : model.eos_token_ids) {
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
}

uint64_t RandomSeed() {
  thread_local std::mt19937_64 generator = [] {
    std::random_device device;
    return std::mt19937_64(static_cast<uint64_t>(device()) << 32 | device());
  }();
  return generator();
}

}  // namespace minke::gateway
