#include "libs/tracing/span.h"

#include <algorithm>
#include <random>

#include "absl/strings/str_format.h"

namespace minke::tracing {
namespace {

std::mt19937_64& Random() {
  static thread_local std::mt19937_64 random = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  return random;
}

// Lower case only, as the standard has it; -1 if it is no hex digit.
int HexDigit(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

bool ParseHex(std::string_view text, uint8_t* bytes) {
  for (size_t i = 0; i < text.size(); i += 2) {
    const int high = HexDigit(text[i]), low = HexDigit(text[i + 1]);
    if (high < 0 || low < 0) return false;
    bytes[i / 2] = static_cast<uint8_t>(high << 4 | low);
  }
  return true;
}

}  // namespace

std::string FormatTraceparent(const SpanContext& context) {
  std::string text = "00-";
  for (const uint8_t byte : context.trace) absl::StrAppendFormat(&text, "%02x", byte);
  absl::StrAppendFormat(&text, "-%016x-%02x", context.span, context.sampled ? 1 : 0);
  return text;
}

std::optional<SpanContext> ParseTraceparent(std::string_view text) {
  constexpr size_t kLength = 55;
  if (text.size() < kLength || text[2] != '-' || text[35] != '-' || text[52] != '-') return std::nullopt;
  uint8_t version = 0, flags = 0;
  std::array<uint8_t, 8> span{};
  SpanContext context;
  if (!ParseHex(text.substr(0, 2), &version) || !ParseHex(text.substr(3, 32), context.trace.data()) ||
      !ParseHex(text.substr(36, 16), span.data()) || !ParseHex(text.substr(53, 2), &flags)) {
    return std::nullopt;
  }
  // Later versions may have more behind a dash; of this one nothing may follow.
  if (version == 0xff || (version == 0 ? text.size() != kLength : text.size() > kLength && text[55] != '-'))
    return std::nullopt;
  for (const uint8_t byte : span) context.span = context.span << 8 | byte;
  const bool no_trace =
      std::all_of(context.trace.begin(), context.trace.end(), [](uint8_t b) { return b == 0; });
  if (no_trace || context.span == 0) return std::nullopt;
  context.sampled = (flags & 1) != 0;
  return context;
}

TraceId NewTraceId() {
  TraceId id;
  do {
    for (size_t i = 0; i < id.size(); i += 8) {
      uint64_t bits = Random()();
      for (size_t j = 0; j < 8; ++j, bits >>= 8) id[i + j] = static_cast<uint8_t>(bits);
    }
  } while (id == TraceId{});
  return id;
}

SpanId NewSpanId() {
  SpanId id = 0;
  while (id == 0) id = Random()();
  return id;
}

}  // namespace minke::tracing
