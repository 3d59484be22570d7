// Server-sent events that `minke bench serve` and `minke chat` read from any server. The first byte says how
// the bytes are cut; the cuts make no difference.
#include <string>
#include <vector>

#include "cli/bench/answer_reader.h"
#include "cli/bench/sse_parser.h"
#include "tests/fuzz/fuzz.h"

namespace {

using minke::cli::bench::AnswerReader;
using minke::cli::bench::SseEvent;
using minke::cli::bench::SseParser;

std::vector<std::pair<std::string, std::string>> EventsOf(std::string_view text, size_t piece, bool* sane) {
  std::vector<std::pair<std::string, std::string>> events;
  const auto take = [&](const SseEvent& event) { events.emplace_back(event.name, event.data); };
  SseParser parser;
  *sane = true;
  for (size_t at = 0; at < text.size() && *sane; at += piece)
    *sane = parser.Feed(text.substr(at, piece), take);
  if (*sane) parser.Finish(take);
  return events;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  minke::fuzz::Input input(data, bytes);
  const size_t piece = 1 + input.Take<uint8_t>() % 32;
  const std::string_view text = input.rest();
  bool whole_sane = false, cut_sane = false;
  const auto whole = EventsOf(text, std::max<size_t>(1, text.size()), &whole_sane);
  const auto cut = EventsOf(text, piece, &cut_sane);
  FUZZ_ASSERT(whole_sane == cut_sane && whole == cut);
  for (const auto& [name, event] : whole) FUZZ_ASSERT(name.find_first_of("\r\n") == std::string::npos);

  AnswerReader one, other;
  const auto now = minke::cli::bench::Clock::time_point{} + std::chrono::seconds(1);
  one.Feed(text, now);
  one.Finish(now);
  for (size_t at = 0; at < text.size(); at += piece) other.Feed(text.substr(at, piece), now);
  other.Finish(now);
  FUZZ_ASSERT(one.whole() == other.whole() && one.failure() == other.failure());
  FUZZ_ASSERT(one.output_events() == other.output_events() && one.token_ids() == other.token_ids());
  FUZZ_ASSERT(one.failure().find('\n') == std::string::npos);
  FUZZ_ASSERT(!(one.whole() && !one.failure().empty()));
  FUZZ_ASSERT(minke::cli::bench::ErrorText(text).find('\n') == std::string::npos);
  return 0;
}
