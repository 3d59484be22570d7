// A span of a distributed trace, and how a trace is named between processes (W3C Trace Context). Plain
// values.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace minke::tracing {

using TraceId = std::array<uint8_t, 16>;  // not all zero
using SpanId = uint64_t;                  // 0: none
using Time = std::chrono::system_clock::time_point;

inline Time Now() { return std::chrono::system_clock::now(); }

// Where new spans go: a trace, and the span that will be their parent.
struct SpanContext {
  TraceId trace{};
  SpanId span = 0;
  bool sampled = false;
};

// "00-<32 hex digits>-<16 hex digits>-<2 hex digits>".
std::string FormatTraceparent(const SpanContext& context);
// Of any version but ff; nullopt if it is not one: whoever sent it starts no trace of ours.
std::optional<SpanContext> ParseTraceparent(std::string_view traceparent);

TraceId NewTraceId();
SpanId NewSpanId();

using Value = std::variant<std::string, int64_t, double, bool, std::vector<std::string>>;
using Attributes = std::vector<std::pair<std::string, Value>>;  // keys as OpenTelemetry names them

enum class SpanKind : uint8_t { kInternal, kServer, kClient };

struct Span {
  TraceId trace{};
  SpanId id = 0, parent = 0;  // parent 0: the root
  std::string name;
  SpanKind kind = SpanKind::kInternal;
  Time begin, end;
  Attributes attributes;
  bool failed = false;
  std::string error;  // of a failed one, for people
};

}  // namespace minke::tracing
