// One line per event on stderr: time, level, tag (the folder), message with key=value fields.
// Prompts and generated text are never logged. Thread-safe.
#pragma once

#include <string_view>

namespace minke::log {

enum class Level { kDebug, kInfo, kWarning, kError };

void SetLevel(Level level);
// Prefix of every line, such as "router"; "minke up" interleaves the lines of its children.
void SetProcessName(std::string_view name);

void Debug(std::string_view tag, std::string_view message);
void Info(std::string_view tag, std::string_view message);
void Warning(std::string_view tag, std::string_view message);
void Error(std::string_view tag, std::string_view message);

}  // namespace minke::log
