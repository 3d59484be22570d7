// What is kept of one generation request for those who operate: its spans (docs/tracing.md), its line in the
// log, and the table of phases of one that was slow. Never its text.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "libs/tracing/tracer.h"
#include "services/gateway/generation/types.h"

namespace minke::gateway {

// Shared by all requests; outlives them.
struct RequestRecorder {
  tracing::Tracer* tracer = nullptr;  // null: no traces
  tracing::Sampler sampler{0};
  std::chrono::milliseconds slow{0};  // requests that take longer are logged with their phases; 0: none
  std::string model;
};

// What is known of a request when it is admitted.
struct RequestFacts {
  std::string request_id;
  std::string response_id;  // as the answer names itself
  std::string traceparent;  // the client's; may be empty or wrong
  std::string operation;    // OpenTelemetry's gen_ai.operation.name: "chat", "text_completion"
  std::string route;        // "/v1/chat/completions", or the gRPC method
  std::chrono::steady_clock::time_point arrived = std::chrono::steady_clock::now();
  bool stream = false;
  uint32_t sequences = 1;
  uint64_t prompt_tokens = 0;
  float temperature = 1, top_p = 1;
  uint32_t max_tokens = 0;
};

// Thread-compatible; events of one request come one after the other anyway.
class RequestRecord {
 public:
  using Clock = std::chrono::steady_clock;

  // `recorder` is borrowed; null: nothing is recorded.
  RequestRecord(const RequestRecorder* recorder, RequestFacts facts);
  RequestRecord(const RequestRecord&) = delete;
  RequestRecord& operator=(const RequestRecord&) = delete;
  ~RequestRecord();  // a request that has not ended was left by its client

  // How attention nodes shall name what they do for it.
  SequenceOrigin origin() const;
  // An event of one of its sequences, which is about to be consumed.
  void OnEvent(const SequenceEvent& event, Clock::time_point received);
  // The request is through. `status`: HTTP's, of the answer or what it would be; `error`: for people, empty
  // for none.
  void End(int status, const std::string& error);

 private:
  void RecordSpan(int status, const std::string& error, Clock::time_point now);
  void LogPhases(int status, const std::string& error, Clock::time_point now) const;

  const RequestRecorder* const recorder_;  // null: nothing is recorded
  const RequestFacts facts_;
  const Clock::time_point admitted_ = Clock::now();
  const tracing::Time began_ = tracing::Now();
  tracing::SpanContext parent_;
  tracing::SpanId span_ = 0;
  bool ended_ = false;
  std::chrono::microseconds queue_time_{0};  // the longest
  Clock::time_point first_token_{};
  uint64_t completion_tokens_ = 0, cached_tokens_ = 0;
  uint32_t moves_ = 0;
  NodeTimes times_;  // of the sequence that ended last
  std::vector<std::string> finish_reasons_;
};

}  // namespace minke::gateway
