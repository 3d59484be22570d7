#include "libs/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <cmath>
#include <memory>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "libs/base/utf8.h"

namespace minke::log {
namespace {

constexpr char kTextPattern[] = "%Y-%m-%dT%H:%M:%S.%e %^%l%$ %v";
constexpr char kJsonPattern[] = "%v";

spdlog::logger& Logger() {
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made =
        std::make_shared<spdlog::logger>("minke", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    made->set_pattern(kTextPattern);
    return made;
  }();
  return *logger;
}

std::string& ProcessName() {
  static std::string name;
  return name;
}

Format& CurrentFormat() {
  static Format format = Format::kText;
  return format;
}

spdlog::level::level_enum ToSpdlog(Level level) {
  switch (level) {
    case Level::kDebug:
      return spdlog::level::debug;
    case Level::kInfo:
      return spdlog::level::info;
    case Level::kWarning:
      return spdlog::level::warn;
    case Level::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

std::string_view NameOf(Level level) {
  switch (level) {
    case Level::kDebug:
      return "debug";
    case Level::kInfo:
      return "info";
    case Level::kWarning:
      return "warning";
    case Level::kError:
      return "error";
  }
  return "error";
}

// With quotes and backslashes escaped too where the text stands between quotes.
void AppendEscaped(std::string_view text, bool quoted, std::string& out) {
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      absl::StrAppendFormat(&out, "\\u%04x", byte);
    } else {
      if (quoted && (c == '"' || c == '\\')) out += '\\';
      out += c;
    }
  }
}

// What is not UTF-8 becomes U+FFFD: a collector drops a line that is not JSON.
std::string ValidUtf8(std::string_view text) {
  std::string valid;
  valid.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = NextUtf8(text);
    const bool whole = step.kind == Utf8Kind::kCharacter;
    valid += whole ? text.substr(0, step.length) : kReplacementCharacter;
    text.remove_prefix(whole ? step.length : 1);
  }
  return valid;
}

void AppendJson(std::string_view key, std::string_view value, bool bare, std::string& out) {
  if (out.size() > 1) out += ',';
  out += '"';
  AppendEscaped(ValidUtf8(key), true, out);
  out += bare ? "\":" : "\":\"";
  AppendEscaped(ValidUtf8(value), !bare, out);
  if (!bare) out += '"';
}

bool NeedsQuotes(std::string_view value) {
  return value.empty() || value.find_first_of(" \"=\n\t") != std::string_view::npos;
}

}  // namespace

Field::Field(std::string_view key_in, double value_in)
    : key(key_in),
      own(std::isfinite(value_in) ? absl::StrFormat("%.3f", value_in) : std::string("null")),
      bare(true) {}

void SetLevel(Level level) { Logger().set_level(ToSpdlog(level)); }

void SetFormat(Format format) {
  CurrentFormat() = format;
  Logger().set_pattern(format == Format::kJson ? kJsonPattern : kTextPattern);
}

void SetProcessName(std::string_view name) { ProcessName() = std::string(name); }

bool IsOn(Level level) { return Logger().should_log(ToSpdlog(level)); }

std::string FormatText(std::string_view process, std::string_view tag, std::string_view message,
                       const Field* fields, size_t count) {
  std::string line(process);
  if (!line.empty()) line += ' ';
  line += '[';
  line += tag;
  line += "] ";
  AppendEscaped(message, false, line);
  for (size_t i = 0; i < count; ++i) {
    line += ' ';
    line += fields[i].key;
    line += '=';
    const bool quoted = NeedsQuotes(fields[i].value());
    if (quoted) line += '"';
    AppendEscaped(fields[i].value(), quoted, line);
    if (quoted) line += '"';
  }
  return line;
}

std::string FormatJson(std::string_view time, Level level, std::string_view process, std::string_view tag,
                       std::string_view message, const Field* fields, size_t count) {
  std::string line = "{";
  AppendJson("time", time, false, line);
  AppendJson("level", NameOf(level), false, line);
  if (!process.empty()) AppendJson("process", process, false, line);
  AppendJson("tag", tag, false, line);
  AppendJson("message", message, false, line);
  for (size_t i = 0; i < count; ++i) AppendJson(fields[i].key, fields[i].value(), fields[i].bare, line);
  return line + "}";
}

void Write(Level level, std::string_view tag, std::string_view message, const Field* fields, size_t count) {
  if (!IsOn(level)) return;
  const std::string line =
      CurrentFormat() == Format::kText
          ? FormatText(ProcessName(), tag, message, fields, count)
          : FormatJson(absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone()), level,
                       ProcessName(), tag, message, fields, count);
  Logger().log(ToSpdlog(level), "{}", line);
}

void Debug(std::string_view tag, std::string_view message, Fields fields) {
  Write(Level::kDebug, tag, message, fields.begin(), fields.size());
}
void Info(std::string_view tag, std::string_view message, Fields fields) {
  Write(Level::kInfo, tag, message, fields.begin(), fields.size());
}
void Warning(std::string_view tag, std::string_view message, Fields fields) {
  Write(Level::kWarning, tag, message, fields.begin(), fields.size());
}
void Error(std::string_view tag, std::string_view message, Fields fields) {
  Write(Level::kError, tag, message, fields.begin(), fields.size());
}

}  // namespace minke::log
