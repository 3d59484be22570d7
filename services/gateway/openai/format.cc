#include "services/gateway/openai/format.h"

#include "services/gateway/generation/choice.h"
#include "services/gateway/openai/json_writer.h"

namespace minke::gateway {
namespace {

void WriteFinish(FinishReason finish, JsonWriter* json) {
  json->Key("finish_reason");
  switch (finish) {  // no default: a new reason must be named
    case FinishReason::kNone:
      json->Null();
      return;
    case FinishReason::kStop:
      json->String("stop");
      return;
    case FinishReason::kLength:
      json->String("length");
      return;
    case FinishReason::kError:
      json->String("error");
      return;
  }
}

void WriteIds(const char* key, const TokenIds& ids, JsonWriter* json) {
  json->Key(key).BeginArray();
  for (const uint32_t id : ids) json->Unsigned(id);
  json->EndArray();
}

void WriteCompletionLogprobs(const AnswerHead& head, const std::vector<LogprobEntry>& entries,
                             JsonWriter* json) {
  json->Key("logprobs").BeginObject();
  json->Key("tokens").BeginArray();
  for (const LogprobEntry& entry : entries) json->String(TokenName(head.tokenizer, entry.token_id));
  json->EndArray();
  json->Key("token_logprobs").BeginArray();
  for (const LogprobEntry& entry : entries) entry.logprob ? json->Float(*entry.logprob) : json->Null();
  json->EndArray();
  json->Key("top_logprobs").BeginArray();
  for (const LogprobEntry& entry : entries) {
    if (!entry.logprob) {
      json->Null();
      continue;
    }
    json->BeginObject();
    bool has_own = false;
    for (const auto& [id, logprob] : entry.top) {
      json->Key(TokenName(head.tokenizer, id)).Float(logprob);
      has_own = has_own || id == entry.token_id;
    }
    if (!has_own) json->Key(TokenName(head.tokenizer, entry.token_id)).Float(*entry.logprob);
    json->EndObject();
  }
  json->EndArray();
  json->Key("text_offset").BeginArray();
  for (const LogprobEntry& entry : entries) json->Unsigned(entry.text_offset);
  json->EndArray();
  json->EndObject();
}

// The three fields that name a token in chat's logprobs.
void WriteChatToken(const AnswerHead& head, uint32_t id, float logprob, JsonWriter* json) {
  json->Key("token").String(TokenName(head.tokenizer, id));
  json->Key("logprob").Float(logprob);
  json->Key("bytes");
  if (head.tokenizer == nullptr || !head.tokenizer->HasToken(id)) {
    json->Null();
    return;
  }
  json->BeginArray();
  for (const char byte : head.tokenizer->TokenBytes(id)) json->Unsigned(static_cast<uint8_t>(byte));
  json->EndArray();
}

void WriteChatLogprobs(const AnswerHead& head, const std::vector<LogprobEntry>& entries, JsonWriter* json) {
  json->Key("logprobs").BeginObject();
  json->Key("content").BeginArray();
  for (const LogprobEntry& entry : entries) {
    json->BeginObject();
    WriteChatToken(head, entry.token_id, entry.logprob.value_or(0), json);
    json->Key("top_logprobs").BeginArray();
    for (const auto& [id, logprob] : entry.top) {
      json->BeginObject();
      WriteChatToken(head, id, logprob, json);
      json->EndObject();
    }
    json->EndArray();
    json->EndObject();
  }
  json->EndArray();
  json->Key("refusal").Null();
  json->EndObject();
}

void WriteLogprobs(const AnswerHead& head, const ChoiceContent& content, JsonWriter* json) {
  if (!content.want_logprobs) {
    json->Key("logprobs").Null();
  } else if (head.endpoint == Endpoint::kCompletions) {
    WriteCompletionLogprobs(head, content.logprobs, json);
  } else {
    WriteChatLogprobs(head, content.logprobs, json);
  }
}

void WriteTail(const AnswerHead& head, const ChoiceContent& content, bool with_prompt, JsonWriter* json) {
  WriteLogprobs(head, content, json);
  WriteFinish(content.finish, json);
  if (head.return_token_ids) {
    if (with_prompt && content.prompt_token_ids != nullptr)
      WriteIds("prompt_token_ids", *content.prompt_token_ids, json);
    WriteIds("token_ids", content.token_ids, json);
  }
}

void WriteHead(const AnswerHead& head, const char* object, JsonWriter* json) {
  json->Key("id").String(head.id);
  json->Key("object").String(object);
  json->Key("created").Int(head.created);
  json->Key("model").String(head.model);
}

void WriteUsage(const Usage& usage, JsonWriter* json) {
  json->Key("usage").BeginObject();
  json->Key("prompt_tokens").Unsigned(usage.prompt_tokens);
  json->Key("completion_tokens").Unsigned(usage.completion_tokens);
  json->Key("total_tokens").Unsigned(usage.prompt_tokens + usage.completion_tokens);
  json->Key("prompt_tokens_details")
      .BeginObject()
      .Key("cached_tokens")
      .Unsigned(usage.cached_tokens)
      .EndObject();
  json->EndObject();
}

const char* ChunkObject(Endpoint endpoint) {
  return endpoint == Endpoint::kCompletions ? "text_completion" : "chat.completion.chunk";
}

}  // namespace

std::string WholeAnswer(const AnswerHead& head, const std::vector<ChoiceContent>& choices,
                        const Usage& usage) {
  std::string body;
  JsonWriter json(&body);
  json.BeginObject();
  WriteHead(head, head.endpoint == Endpoint::kCompletions ? "text_completion" : "chat.completion", &json);
  json.Key("choices").BeginArray();
  for (const ChoiceContent& choice : choices) {
    json.BeginObject();
    json.Key("index").Unsigned(choice.index);
    if (head.endpoint == Endpoint::kCompletions) {
      json.Key("text").String(choice.text);
    } else {
      json.Key("message").BeginObject();
      json.Key("role").String("assistant");
      json.Key("content").String(choice.text);
      json.Key("refusal").Null();
      json.EndObject();
    }
    WriteTail(head, choice, /*with_prompt=*/true, &json);
    json.EndObject();
  }
  json.EndArray();
  WriteUsage(usage, &json);
  json.EndObject();
  return body;
}

void AppendChunk(const AnswerHead& head, const ChoiceContent& content, std::string* out) {
  out->append("data: ");
  JsonWriter json(out);
  json.BeginObject();
  WriteHead(head, ChunkObject(head.endpoint), &json);
  json.Key("choices").BeginArray().BeginObject();
  json.Key("index").Unsigned(content.index);
  if (head.endpoint == Endpoint::kCompletions) {
    json.Key("text").String(content.text);
  } else {
    json.Key("delta").BeginObject();
    if (content.first) json.Key("role").String("assistant");
    json.Key("content").String(content.text);
    json.EndObject();
  }
  WriteTail(head, content, content.first, &json);
  json.EndObject().EndArray();
  if (head.include_usage) json.Key("usage").Null();
  json.EndObject();
  out->append("\n\n");
}

void AppendUsageChunk(const AnswerHead& head, const Usage& usage, std::string* out) {
  out->append("data: ");
  JsonWriter json(out);
  json.BeginObject();
  WriteHead(head, ChunkObject(head.endpoint), &json);
  json.Key("choices").BeginArray().EndArray();
  WriteUsage(usage, &json);
  json.EndObject();
  out->append("\n\n");
}

void AppendErrorEvent(const ApiError& error, std::string* out) {
  out->append("data: ").append(ErrorBody(error)).append("\n\n");
}

}  // namespace minke::gateway
