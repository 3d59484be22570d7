// Finds stop strings in text that arrives in pieces. Text that may be the beginning of one is held back, so
// that no part of a stop string ever reaches the client. Thread-compatible.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace minke::gateway {

class StopMatcher {
 public:
  // REQUIRES: no empty string.
  explicit StopMatcher(std::vector<std::string> stops);

  // What can be shown after `text` has arrived; once matched, nothing more.
  std::string Push(std::string_view text);
  // What was held back, when no more text comes.
  std::string Finish();
  bool matched() const { return matched_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool matched_ = false;
};

}  // namespace minke::gateway
