#include "services/gateway/generation/request_record.h"

#include <algorithm>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/strings.h"

namespace minke::gateway {
namespace {

constexpr char kTag[] = "gateway/request";
constexpr int kClientLeft = 499;  // as proxies log it; never sent

double Ms(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

const char* NameOf(FinishReason reason) {
  switch (reason) {  // no default: a new reason must be named
    case FinishReason::kNone:
      return "none";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

}  // namespace

RequestRecord::RequestRecord(const RequestRecorder* recorder, RequestFacts facts)
    : recorder_(recorder), facts_(std::move(facts)) {
  if (recorder_ == nullptr || recorder_->tracer == nullptr) return;
  parent_ = recorder_->sampler.Sample(facts_.traceparent);
  if (parent_.sampled) span_ = tracing::NewSpanId();
}

RequestRecord::~RequestRecord() { End(kClientLeft, "the client left"); }

SequenceOrigin RequestRecord::origin() const {
  SequenceOrigin origin{.request_id = facts_.request_id};
  if (span_ != 0) origin.traceparent = tracing::FormatTraceparent({parent_.trace, span_, true});
  return origin;
}

void RequestRecord::OnEvent(const SequenceEvent& event, Clock::time_point received) {
  if (recorder_ == nullptr) return;
  queue_time_ = std::max(queue_time_, event.queue_time);
  cached_tokens_ += event.cached_prompt_tokens;
  completion_tokens_ += event.token_ids.size();
  if (!event.token_ids.empty() && first_token_ == Clock::time_point{}) first_token_ = received;
  if (event.finish == FinishReason::kNone) return;
  finish_reasons_.emplace_back(NameOf(event.finish));
  moves_ += event.moves;
  if (event.times) times_ = *event.times;
}

void RequestRecord::End(int status, const std::string& error) {
  if (std::exchange(ended_, true) || recorder_ == nullptr) return;
  const Clock::time_point now = Clock::now();
  const bool failed = status >= 500;
  const log::Level level = failed ? log::Level::kWarning : log::Level::kDebug;
  if (log::IsOn(level)) {
    const log::Field fields[] = {
        {"request_id", facts_.request_id},         {"status", status},
        {"total_ms", Ms(now - facts_.arrived)},    {"prompt_tokens", facts_.prompt_tokens},
        {"completion_tokens", completion_tokens_}, {"error", error}};
    log::Write(level, kTag, failed ? "failed" : "done", fields, std::size(fields) - (error.empty() ? 1 : 0));
  }
  if (recorder_->slow.count() > 0 && now - facts_.arrived > recorder_->slow) LogPhases(status, error, now);
  if (span_ != 0) RecordSpan(status, error, now);
}

// One line: the table of where a slow request's time went.
void RequestRecord::LogPhases(int status, const std::string& error, Clock::time_point now) const {
  const bool generated = first_token_ != Clock::time_point{};
  const Clock::time_point first = generated ? first_token_ : now;
  const Clock::duration waited = first - admitted_;
  std::vector<log::Field> fields = {
      {"request_id", facts_.request_id},
      {"route", facts_.route},
      {"status", status},
      {"stream", facts_.stream},
      {"sequences", facts_.sequences},
      {"prompt_tokens", facts_.prompt_tokens},
      {"cached_tokens", cached_tokens_},
      {"completion_tokens", completion_tokens_},
      {"moves", moves_},
      {"total_ms", Ms(now - facts_.arrived)},
      {"read_and_tokenise_ms", Ms(admitted_ - facts_.arrived)},
      {"queue_ms", Ms(queue_time_)},
      {"prefill_ms", Ms(std::max<Clock::duration>(waited - queue_time_, Clock::duration(0)))},
      {"decode_ms", Ms(now - first)},
  };
  std::vector<std::string> names;  // borrowed by fields
  names.reserve(2 * (times_.prefill.phases.size() + times_.decode.phases.size() + 2));
  const auto add = [&](const char* part, const PhaseTimes& times) {
    if (times.steps == 0) return;
    names.push_back(StrCat(part, "_steps"));
    fields.emplace_back(names.back(), times.steps);
    for (const auto& [phase, time] : times.phases) {
      names.push_back(StrCat(part, "_", phase, "_ms"));
      fields.emplace_back(names.back(), Ms(time));
    }
  };
  add("prefill", times_.prefill);
  add("decode", times_.decode);
  if (!error.empty()) fields.emplace_back("error", error);
  log::Write(log::Level::kWarning, kTag, "slow request", fields.data(), fields.size());
}

void RequestRecord::RecordSpan(int status, const std::string& error, Clock::time_point now) {
  tracing::Span span;
  span.trace = parent_.trace;
  span.id = span_;
  span.parent = parent_.span;
  span.name = StrCat(facts_.operation, " ", recorder_->model);
  span.kind = tracing::SpanKind::kServer;
  // One clock for the beginning, the other for how long it took: the wall clock may be set meanwhile.
  span.begin = began_ - std::chrono::duration_cast<tracing::Time::duration>(admitted_ - facts_.arrived);
  span.end = began_ + std::chrono::duration_cast<tracing::Time::duration>(now - admitted_);
  const auto integer = [](uint64_t value) { return static_cast<int64_t>(value); };
  const auto seconds = [](Clock::duration time) { return std::chrono::duration<double>(time).count(); };
  span.attributes = {{"gen_ai.operation.name", facts_.operation},
                     {"gen_ai.provider.name", std::string("minke")},
                     {"gen_ai.request.model", recorder_->model},
                     {"gen_ai.response.model", recorder_->model},
                     {"gen_ai.response.id", facts_.response_id},
                     {"gen_ai.request.max_tokens", integer(facts_.max_tokens)},
                     {"gen_ai.request.temperature", static_cast<double>(facts_.temperature)},
                     {"gen_ai.request.top_p", static_cast<double>(facts_.top_p)},
                     {"gen_ai.request.choice.count", integer(facts_.sequences)},
                     {"gen_ai.response.finish_reasons", finish_reasons_},
                     {"gen_ai.usage.input_tokens", integer(facts_.prompt_tokens)},
                     {"gen_ai.usage.output_tokens", integer(completion_tokens_)},
                     {"http.route", facts_.route},
                     {"http.response.status_code", integer(static_cast<uint64_t>(status))},
                     {"minke.request_id", facts_.request_id},
                     {"minke.cached_tokens", integer(cached_tokens_)},
                     {"minke.moves", integer(moves_)},
                     {"minke.time_in_queue", seconds(queue_time_)},
                     {"minke.stream", facts_.stream}};
  if (first_token_ != Clock::time_point{}) {
    span.attributes.emplace_back("minke.time_to_first_token", seconds(first_token_ - facts_.arrived));
  }
  if (!error.empty()) {
    span.failed = true;
    span.error = error;
    span.attributes.emplace_back("error.type", StrCat(status));
  }
  recorder_->tracer->Record(std::move(span));
}

}  // namespace minke::gateway
