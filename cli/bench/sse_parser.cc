#include "cli/bench/sse_parser.h"

#include <algorithm>

namespace minke::cli::bench {

bool SseParser::Feed(std::string_view bytes, absl::FunctionRef<void(const SseEvent&)> on_event) {
  while (!bytes.empty()) {
    if (after_cr_) {
      after_cr_ = false;
      if (bytes.front() == '\n') {  // the rest of a CRLF
        bytes.remove_prefix(1);
        continue;
      }
    }
    // Not find_first_of: it searches the set anew for every byte.
    const auto line_end =
        std::find_if(bytes.begin(), bytes.end(), [](char c) { return c == '\n' || c == '\r'; });
    const auto end = static_cast<size_t>(line_end - bytes.begin());
    if (end == bytes.size()) {
      line_.append(bytes);
      break;
    }
    if (line_.empty()) {  // the usual case: no copy
      TakeLine(bytes.substr(0, end), on_event);
    } else {
      line_.append(bytes.substr(0, end));
      TakeLine(line_, on_event);
      line_.clear();
    }
    after_cr_ = bytes[end] == '\r';
    bytes.remove_prefix(end + 1);
  }
  return line_.size() + data_.size() <= kEventBytesMax;
}

void SseParser::Finish(absl::FunctionRef<void(const SseEvent&)> on_event) {
  if (!line_.empty()) TakeLine(line_, on_event);
  line_.clear();
  Dispatch(on_event);
}

void SseParser::TakeLine(std::string_view line, absl::FunctionRef<void(const SseEvent&)> on_event) {
  if (first_line_ && line.starts_with("\xef\xbb\xbf")) line.remove_prefix(3);
  first_line_ = false;
  if (line.empty()) return Dispatch(on_event);
  const size_t colon = line.find(':');
  const std::string_view field = line.substr(0, colon);
  std::string_view value = colon == std::string_view::npos ? std::string_view() : line.substr(colon + 1);
  if (value.starts_with(' ')) value.remove_prefix(1);
  if (field == "event") {
    name_ = value;
  } else if (field == "data" || field == "error") {
    if (field == "error") name_ = field;
    if (has_data_) data_ += '\n';
    data_ += value;
    has_data_ = true;
  }  // others, and comments, whose field is empty: ignored
}

void SseParser::Dispatch(absl::FunctionRef<void(const SseEvent&)> on_event) {
  if (has_data_) on_event({.name = name_, .data = data_});
  name_.clear();
  data_.clear();
  has_data_ = false;
}

}  // namespace minke::cli::bench
