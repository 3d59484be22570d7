#include "services/gateway/openai/generate_exchange.h"

#include <algorithm>
#include <utility>

#include "libs/base/strings.h"

namespace minke::gateway {
namespace {

AnswerHead MakeHead(const GenerateContext& context, const GenerateRequest& request,
                    const std::string& request_id) {
  const bool chat = request.endpoint == Endpoint::kChat;
  return {.endpoint = request.endpoint,
          .id = StrCat(chat ? "chatcmpl-" : "cmpl-", request_id),
          .model = context.model->name,
          .created = std::chrono::duration_cast<std::chrono::seconds>(
                         std::chrono::system_clock::now().time_since_epoch())
                         .count(),
          .tokenizer = context.model->tokenizer.get(),
          .include_usage = request.include_usage,
          .return_token_ids = request.return_token_ids};
}

RequestFacts FactsOf(const GenerateRequest& request, const HttpRequest& http,
                     const std::string& response_id) {
  return {.request_id = http.request_id,
          .response_id = response_id,
          .traceparent = http.traceparent,
          .operation = request.endpoint == Endpoint::kChat ? "chat" : "text_completion",
          .route = http.path,
          .arrived = http.arrived,
          .stream = request.stream,
          .sequences = static_cast<uint32_t>(request.num_sequences()),
          .prompt_tokens = request.prompt_tokens(),
          .temperature = request.sampling.temperature,
          .top_p = request.sampling.top_p,
          .max_tokens = request.sampling.max_tokens};
}

}  // namespace

HttpHead ErrorHead(const ApiError& error) {
  return {.status = error.http_status, .retry_after_s = error.retry_after_s};
}

ImmediateExchange::ImmediateExchange(const ApiError& error)
    : head_(ErrorHead(error)), body_(ErrorBody(error)) {}

GenerateExchange::GenerateExchange(const GenerateContext& context, GenerateRequest request,
                                   Admission::Permit permit, KeyAccount::Permit key_permit,
                                   const HttpRequest& http, std::function<void()> wake)
    : context_(context),
      request_(std::move(request)),
      permit_(std::move(permit)),
      key_permit_(std::move(key_permit)),
      key_headers_(key_permit_.Headers()),
      head_(MakeHead(context, request_, http.request_id)),
      record_(context.recorder, FactsOf(request_, http, head_.id)),
      queue_(std::make_shared<EventQueue>(std::move(wake))),
      unfinished_(request_.num_sequences()),
      silent_at_(Clock::now() + context.silence_max),
      late_at_(request_.timeout_s == 0
                   ? Clock::time_point::max()
                   : Clock::now() +
                         std::chrono::milliseconds(static_cast<int64_t>(1e3 * double{request_.timeout_s}))) {
  context_.counters->generations.fetch_add(1);
  context_.counters->prompt_tokens.fetch_add(request_.prompt_tokens());
  RequestMetrics& metrics = context_.counters->requests;
  metrics.n.Observe(request_.n);
  metrics.max_tokens.Observe(request_.sampling.max_tokens);
  const Clock::time_point arrival = Clock::now();
  sequences_.reserve(unfinished_);
  for (uint32_t index = 0; index < unfinished_; ++index) {
    sequences_.emplace_back(Choice(context_.model->tokenizer.get(), request_.stops),
                            SequenceTimer(&metrics, arrival, PromptOf(index).ids->size()));
    sequences_.back().echoed = !request_.echo;
    sequences_.back().content = NewContent(index);
  }
  for (uint32_t index = 0; index < sequences_.size(); ++index) {
    SequenceSpec spec{PromptOf(index).ids, request_.sampling, late_at_, record_.origin()};
    // Choices of a prompt differ; the same prompt draws the same numbers wherever it stands in a list.
    spec.sampling.seed += index % request_.n;
    sequences_[index].id = context_.pool->Start(std::move(spec), queue_->SinkFor(index));
  }
}

GenerateExchange::~GenerateExchange() {
  if (!done_) context_.counters->generations_abandoned.fetch_add(1);
  CancelAll();
}

void GenerateExchange::CancelAll() {
  for (const Sequence& sequence : sequences_) {
    if (!sequence.choice.finished()) context_.pool->Cancel(sequence.id);
  }
}

ChoiceContent GenerateExchange::NewContent(uint32_t index) const {
  ChoiceContent content;
  content.index = index;
  content.want_logprobs = request_.sampling.logprobs.has_value();
  content.prompt_token_ids = PromptOf(index).ids.get();
  return content;
}

void GenerateExchange::Poll(Output* out) {
  std::vector<EventQueue::Item> items = queue_->Take();
  if (!items.empty()) {
    silent_at_ = Clock::now() + context_.silence_max;
  } else if (!done_ && Clock::now() >= late_at_) {
    Fail({504, "the request was not through by its timeout_s", "", "deadline_exceeded", 0}, out);
  } else if (!done_ && Clock::now() >= silent_at_) {
    Fail({503, "the cluster did not answer in time", "", "timeout", 1}, out);
  }
  for (EventQueue::Item& item : items) {
    if (done_) break;
    Take(item.index, std::move(item.event), item.received, out);
  }
  out->done = done_;
}

void GenerateExchange::Take(uint32_t index, SequenceEvent event, Clock::time_point received, Output* out) {
  Sequence& sequence = sequences_[index];
  if (sequence.choice.finished()) return;  // an event that was on its way when the sequence was cancelled
  record_.OnEvent(event, received);
  if (event.finish == FinishReason::kError) return Fail(FromStatus(event.error), out);
  const std::chrono::microseconds queue_time = event.queue_time;

  cached_tokens_ += event.cached_prompt_tokens;
  std::move(event.prompt_logprobs.begin(), event.prompt_logprobs.end(),
            std::back_inserter(sequence.prompt_logprobs));
  const bool generates = !event.token_ids.empty() || event.finish != FinishReason::kNone;
  if (!sequence.echoed) {
    const bool complete = !request_.sampling.prompt_logprobs ||
                          sequence.prompt_logprobs.size() + 1 >= PromptOf(index).ids->size();
    if (complete || generates) Echo(index, out);
  }
  if (!generates) return sequence.timer.OnEvent(received, 0, queue_time);

  const FinishReason cluster_finish = event.finish;
  ChoiceDelta delta = sequence.choice.Take(std::move(event));
  context_.counters->completion_tokens.fetch_add(delta.token_ids.size());
  key_permit_.Generated(delta.token_ids.size());
  sequence.timer.OnEvent(received, delta.token_ids.size(), queue_time);
  sequence.timer.End(delta.finish);
  ChoiceContent content = NewContent(index);
  content.text = std::move(delta.text);
  content.finish = delta.finish;
  content.logprobs.reserve(delta.logprobs.size());
  for (size_t i = 0; i < delta.logprobs.size(); ++i) {
    TokenLogprob& from = delta.logprobs[i];
    content.logprobs.push_back({from.token_id, from.logprob, std::move(from.top), delta.text_offsets[i]});
  }
  content.token_ids = std::move(delta.token_ids);
  Emit(index, std::move(content), out);
  if (delta.finish == FinishReason::kNone) return;
  // A stop string ends a sequence that the cluster would go on with.
  if (cluster_finish == FinishReason::kNone) context_.pool->Cancel(sequence.id);
  if (--unfinished_ == 0) Finish(out);
}

void GenerateExchange::Echo(uint32_t index, Output* out) {
  Sequence& sequence = sequences_[index];
  const PreparedPrompt& prompt = PromptOf(index);
  ChoiceContent content = NewContent(index);
  content.text = prompt.echo_text;
  if (request_.sampling.prompt_logprobs) {
    const std::vector<uint64_t> offsets = sequence.choice.PromptOffsets(*prompt.ids);
    content.logprobs.push_back({(*prompt.ids)[0], std::nullopt, {}, 0});
    for (size_t i = 0; i < sequence.prompt_logprobs.size() && i + 1 < prompt.ids->size(); ++i) {
      TokenLogprob& from = sequence.prompt_logprobs[i];
      content.logprobs.push_back({from.token_id, from.logprob, std::move(from.top), offsets[i + 1]});
    }
  }
  sequence.prompt_logprobs = {};
  sequence.choice.Prepend(prompt.echo_text);
  sequence.echoed = true;
  Emit(index, std::move(content), out);
}

void GenerateExchange::Emit(uint32_t index, ChoiceContent content, Output* out) {
  Sequence& sequence = sequences_[index];
  if (request_.stream) {
    if (!std::exchange(head_sent_, true)) {
      out->head = HttpHead{
          .content_type = "text/event-stream; charset=utf-8", .stream = true, .fields = key_headers_};
    }
    content.first = std::exchange(sequence.first_chunk, false);
    AppendChunk(head_, content, &out->body);
    return;
  }
  ChoiceContent& whole = sequence.content;
  whole.text += content.text;
  whole.finish = content.finish;
  std::move(content.logprobs.begin(), content.logprobs.end(), std::back_inserter(whole.logprobs));
  whole.token_ids.insert(whole.token_ids.end(), content.token_ids.begin(), content.token_ids.end());
}

void GenerateExchange::Finish(Output* out) {
  done_ = true;
  record_.End(200, "");
  Usage usage{.prompt_tokens = request_.prompt_tokens(), .cached_tokens = cached_tokens_};
  for (const Sequence& sequence : sequences_) usage.completion_tokens += sequence.choice.completion_tokens();
  usage.cached_tokens = std::min(usage.cached_tokens, usage.prompt_tokens);  // n choices share their prompt
  if (request_.stream) {
    if (request_.include_usage) AppendUsageChunk(head_, usage, &out->body);
    out->body += kDoneEvent;
    return;
  }
  std::vector<ChoiceContent> choices;
  choices.reserve(sequences_.size());
  for (Sequence& sequence : sequences_) choices.push_back(std::move(sequence.content));
  out->head = HttpHead{.fields = key_headers_};
  out->body = WholeAnswer(head_, choices, usage);
}

void GenerateExchange::Fail(const ApiError& error, Output* out) {
  done_ = true;
  record_.End(error.http_status, error.message);
  for (Sequence& sequence : sequences_) sequence.timer.End(SequenceEnd::kError);
  CancelAll();
  if (head_sent_) {
    if (error.http_status != 504) context_.counters->stream_errors.fetch_add(1);  // the client's own deadline
    AppendErrorEvent(error, &out->body);
    return;
  }
  head_sent_ = true;
  out->head = ErrorHead(error);
  out->body = ErrorBody(error);
}

}  // namespace minke::gateway
