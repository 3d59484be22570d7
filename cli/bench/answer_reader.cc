#include "cli/bench/answer_reader.h"

#include "libs/base/strings.h"
#include "nlohmann/json.hpp"

namespace minke::cli::bench {
namespace {

using Json = nlohmann::json;

constexpr size_t kErrorTextMax = 300;

// nullptr unless `object` is an object with that key and a value other than null.
const Json* Find(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto at = object.find(key);
  return at == object.end() || at->is_null() ? nullptr : &*at;
}

std::optional<int64_t> Count(const Json& object, const char* key) {
  const Json* value = Find(object, key);
  if (value == nullptr || !value->is_number_integer()) return std::nullopt;
  return value->get<int64_t>();
}

// Whether there is a value that is not empty: text, or a list of tool calls.
bool HasContent(const Json& object, const char* key) {
  const Json* value = Find(object, key);
  return value != nullptr && (value->is_string() || value->is_array()) && !value->empty() &&
         !(value->is_string() && value->get_ref<const std::string&>().empty());
}

bool HasOutput(const Json& choice) {
  if (HasContent(choice, "token_ids")) return true;
  if (const Json* delta = Find(choice, "delta")) {  // chat; the first often has a role only
    return HasContent(*delta, "content") || HasContent(*delta, "reasoning_content") ||
           HasContent(*delta, "reasoning") || HasContent(*delta, "tool_calls");
  }
  if (HasContent(choice, "text")) return true;
  // A completion's event exists for its tokens: empty text is half of a character, or a server without
  // tokenizer.
  return Find(choice, "text") != nullptr && Find(choice, "finish_reason") == nullptr &&
         Find(choice, "prompt_token_ids") == nullptr;
}

Usage ReadUsage(const Json& json) {
  Usage usage{.prompt_tokens = Count(json, "prompt_tokens"),
              .completion_tokens = Count(json, "completion_tokens")};
  if (const Json* details = Find(json, "prompt_tokens_details"))
    usage.cached_tokens = Count(*details, "cached_tokens");
  return usage;
}

std::string OneLine(std::string_view text) {
  std::string line(text.substr(0, kErrorTextMax));
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < ' ' || c == '\x7f')
      c = ' ';  // newlines, and what would drive a terminal
  }
  if (text.size() > kErrorTextMax) line += "...";
  return line;
}

}  // namespace

std::string ErrorText(std::string_view body) {
  const Json json = Json::parse(body, nullptr, false);
  const Json* error = Find(json, "error");
  if (error == nullptr) error = &json;
  for (const char* key : {"message", "detail"}) {  // FastAPI says "detail"
    const Json* message = Find(*error, key);
    if (message != nullptr && message->is_string()) return OneLine(message->get_ref<const std::string&>());
  }
  if (error->is_string()) return OneLine(error->get_ref<const std::string&>());
  return OneLine(body);
}

void AnswerReader::Feed(std::string_view bytes, Clock::time_point now) {
  const auto take = [&](const SseEvent& event) { TakeEvent(event, now); };
  if (!parser_.Feed(bytes, take))
    Fail(StrCat("an event is longer than ", SseParser::kEventBytesMax, " bytes"));
}

void AnswerReader::Finish(Clock::time_point now) {
  parser_.Finish([&](const SseEvent& event) { TakeEvent(event, now); });
  if (!whole()) Fail("the stream ended without finish_reason and [DONE]");
}

void AnswerReader::TakeEvent(const SseEvent& event, Clock::time_point now) {
  if (ended()) return;
  std::string_view data = event.data;
  while (!data.empty() && data.back() == ' ') data.remove_suffix(1);
  if (data == "[DONE]") {
    done_ = true;
    return;
  }
  if (data.empty()) return;  // kept alive by an empty event
  const Json json = Json::parse(data, nullptr, false);
  if (event.name == "error" || Find(json, "error") != nullptr) {
    failure_is_error_event_ = failure_.empty();
    return Fail(ErrorText(data));
  }
  if (!json.is_object()) return Fail(StrCat("an event is no JSON object: ", OneLine(data)));
  if (const Json* usage = Find(json, "usage")) usage_ = ReadUsage(*usage);
  const Json* choices = Find(json, "choices");
  if (choices == nullptr || !choices->is_array()) return;
  bool output = false, finished = false;
  for (const Json& choice : *choices) {
    if (!choice.is_object()) continue;
    output |= HasOutput(choice);
    finished |= Find(choice, "finish_reason") != nullptr;
    const Json* ids = Find(choice, "token_ids");
    if (ids != nullptr && ids->is_array())
      token_ids_ = token_ids_.value_or(0) + static_cast<int64_t>(ids->size());
  }
  if (output) NoteOutput(now);
  if (finished) {
    finished_ = true;
    if (first_output_) last_output_ = now;
  }
}

void AnswerReader::NoteOutput(Clock::time_point now) {
  ++output_events_;
  if (!first_output_) {
    first_output_ = now;
  } else {
    gaps_ms_.push_back(std::chrono::duration<double, std::milli>(now - *last_gap_end_).count());
  }
  last_gap_end_ = last_output_ = now;
}

void AnswerReader::Fail(std::string what) {
  if (failure_.empty() && !done_) failure_ = std::move(what);
}

}  // namespace minke::cli::bench
