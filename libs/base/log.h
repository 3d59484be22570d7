// One line per event on stderr, as text or as a JSON object: time, level, process, tag (the folder), message,
// fields. Prompts, generated text and secrets are never logged. Control characters are escaped, so that a
// line stays a line whatever a peer has sent. Thread-safe but for the settings, which belong before threads.
#pragma once

#include <concepts>
#include <initializer_list>
#include <string>
#include <string_view>

namespace minke::log {

enum class Level { kDebug, kInfo, kWarning, kError };
enum class Format {
  kText,  // 2026-01-02T03:04:05.678 info gateway [tag] message key=value
  kJson,  // {"time":"...Z","level":"info","process":"gateway","tag":"...","message":"...","key":value}
};

void SetLevel(Level level);
void SetFormat(Format format);
// Of every line, such as "router"; "minke up" interleaves the lines of its children.
void SetProcessName(std::string_view name);
// Whether lines of this level are written at all; for those whose fields cost something to gather.
bool IsOn(Level level);

// A value is a string, a number or a bool; strings are borrowed for the call.
struct Field {
  Field(std::string_view key_in, std::string_view value_in) : key(key_in), text(value_in) {}
  Field(std::string_view key_in, const char* value_in) : key(key_in), text(value_in) {}
  Field(std::string_view key_in, const std::string& value_in) : key(key_in), text(value_in) {}
  Field(std::string_view key_in, bool value_in)
      : key(key_in), text(value_in ? "true" : "false"), bare(true) {}
  template <std::integral T>
  Field(std::string_view key_in, T value_in) : key(key_in), own(std::to_string(value_in)), bare(true) {}
  Field(std::string_view key_in, double value_in);  // three decimals

  std::string_view value() const { return own.empty() ? text : std::string_view(own); }

  std::string_view key;
  std::string_view text;
  std::string own;    // numbers as text
  bool bare = false;  // not a JSON string
};
using Fields = std::initializer_list<Field>;

void Debug(std::string_view tag, std::string_view message, Fields fields = {});
void Info(std::string_view tag, std::string_view message, Fields fields = {});
void Warning(std::string_view tag, std::string_view message, Fields fields = {});
void Error(std::string_view tag, std::string_view message, Fields fields = {});
void Write(Level level, std::string_view tag, std::string_view message, const Field* fields, size_t count);

// What comes after the level, as it is written; for tests.
std::string FormatText(std::string_view process, std::string_view tag, std::string_view message,
                       const Field* fields, size_t count);
std::string FormatJson(std::string_view time, Level level, std::string_view process, std::string_view tag,
                       std::string_view message, const Field* fields, size_t count);

}  // namespace minke::log
