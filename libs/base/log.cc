#include "libs/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <string>

namespace minke::log {
namespace {

spdlog::logger& Logger() {
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made =
        std::make_shared<spdlog::logger>("minke", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%e %^%L%$ %v");
    return made;
  }();
  return *logger;
}

std::string& ProcessName() {
  static std::string name;
  return name;
}

void Write(spdlog::level::level_enum level, std::string_view tag, std::string_view message) {
  if (ProcessName().empty()) {
    Logger().log(level, "[{}] {}", tag, message);
  } else {
    Logger().log(level, "{} [{}] {}", ProcessName(), tag, message);
  }
}

}  // namespace

void SetLevel(Level level) {
  switch (level) {
    case Level::kDebug:
      return Logger().set_level(spdlog::level::debug);
    case Level::kInfo:
      return Logger().set_level(spdlog::level::info);
    case Level::kWarning:
      return Logger().set_level(spdlog::level::warn);
    case Level::kError:
      return Logger().set_level(spdlog::level::err);
  }
}

void SetProcessName(std::string_view name) { ProcessName() = std::string(name); }

void Debug(std::string_view tag, std::string_view message) { Write(spdlog::level::debug, tag, message); }
void Info(std::string_view tag, std::string_view message) { Write(spdlog::level::info, tag, message); }
void Warning(std::string_view tag, std::string_view message) { Write(spdlog::level::warn, tag, message); }
void Error(std::string_view tag, std::string_view message) { Write(spdlog::level::err, tag, message); }

}  // namespace minke::log
