// Reads one streamed answer of an OpenAI-compatible server: when its tokens came, and how many they were.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/bench/sse_parser.h"

namespace minke::cli::bench {

using Clock = std::chrono::steady_clock;

// What a server says about tokens, in the "usage" of its last event (or of every one: the last counts).
struct Usage {
  std::optional<int64_t> prompt_tokens, completion_tokens, cached_tokens;
};

// Both kinds of event (text_completion, chat.completion.chunk), with what servers do differently: a usage
// event with empty choices or usage beside the last choice, a first chat event with a role only, reasoning
// apart from content, errors as events. Thread-compatible.
class AnswerReader {
 public:
  // Bytes of the body that arrived at `now`.
  void Feed(std::string_view bytes, Clock::time_point now);
  // The body has ended as HTTP says it should.
  void Finish(Clock::time_point now);

  // The server said the answer is whole: "[DONE]".
  bool done() const { return done_; }
  // Nothing more will come that counts: done, or failed.
  bool ended() const { return done_ || !failure_.empty(); }
  // After Finish, or when done: whether this is a whole answer. Servers that leave [DONE] out still give a
  // finish_reason.
  bool whole() const { return failure_.empty() && (done_ || finished_); }
  // Error in the stream ("error event: ...") or unreadable stream; empty if none.
  const std::string& failure() const { return failure_; }
  bool failure_is_error_event() const { return failure_is_error_event_; }

  // Events that carried output, and when the first came; the last also counts if it only carried
  // finish_reason.
  int64_t output_events() const { return output_events_; }
  std::optional<Clock::time_point> first_output() const { return first_output_; }
  std::optional<Clock::time_point> last_output() const { return last_output_; }
  // Times between output events, in ms.
  const std::vector<double>& gaps_ms() const { return gaps_ms_; }
  // Lengths of the "token_ids" of all events; nullopt if there were none (an extension of vLLM and Minke).
  std::optional<int64_t> token_ids() const { return token_ids_; }
  const Usage& usage() const { return usage_; }

 private:
  void TakeEvent(const SseEvent& event, Clock::time_point now);
  void NoteOutput(Clock::time_point now);
  void Fail(std::string what);

  SseParser parser_;
  bool done_ = false;
  bool finished_ = false;  // a finish_reason was seen
  std::string failure_;
  bool failure_is_error_event_ = false;
  int64_t output_events_ = 0;
  std::optional<Clock::time_point> first_output_, last_output_, last_gap_end_;
  std::vector<double> gaps_ms_;
  std::optional<int64_t> token_ids_;
  Usage usage_;
};

// The message of an OpenAI error object, however it is wrapped, or the begin of the text itself; one line.
std::string ErrorText(std::string_view body);

}  // namespace minke::cli::bench
