// Server-sent events out of a byte stream, as servers really write them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"

namespace minke::cli::bench {

struct SseEvent {
  std::string_view name;  // "" unless an "event:" field gave one; "error" also for data in an "error:" field
  std::string_view data;  // lines joined by \n
};

// Follows the WHATWG's "event stream interpretation": LF, CRLF or CR end lines, one space after the colon is
// not part of the value, lines that begin with a colon are comments, a byte order mark may come first. Two
// things are looser, because servers do them: Finish hands out an event whose blank line is missing, and
// "error:" (older llama.cpp) is a field. Thread-compatible.
class SseParser {
 public:
  // Calls on_event for each event that `bytes` completes; the views live during the call.
  // Returns false once an event is longer than kEventBytesMax: this is not a stream of tokens.
  bool Feed(std::string_view bytes, absl::FunctionRef<void(const SseEvent&)> on_event);
  // The stream has ended.
  void Finish(absl::FunctionRef<void(const SseEvent&)> on_event);

  static constexpr size_t kEventBytesMax = 16 << 20;

 private:
  void TakeLine(std::string_view line, absl::FunctionRef<void(const SseEvent&)> on_event);
  void Dispatch(absl::FunctionRef<void(const SseEvent&)> on_event);

  std::string line_;  // begin of a line whose end has not arrived
  bool after_cr_ = false;
  bool first_line_ = true;
  std::string name_, data_;
  bool has_data_ = false;
};

}  // namespace minke::cli::bench
