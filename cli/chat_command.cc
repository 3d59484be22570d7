#include "cli/chat_command.h"

#include <unistd.h>

#include <istream>
#include <ostream>

#include "cli/api_key.h"
#include "cli/http_client.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"

namespace minke::cli {
namespace {

using Json = nlohmann::json;

constexpr absl::Duration kSilenceMax = absl::Seconds(120);

// Posts `request` and writes the text found by `text_of` in each event. The whole text is returned.
template <typename TextOf>
absl::StatusOr<std::string> Stream(const ChatFlags& flags, const std::string& target, Json request,
                                   std::ostream& out, TextOf text_of) {
  MK_ASSIGN_OR_RETURN(const Endpoint endpoint, ToEndpoint(flags.url, flags.tls));
  MK_ASSIGN_OR_RETURN(const std::string key, FirstKey(flags.api_key_file));
  request["stream"] = true;
  request["max_tokens"] = flags.max_tokens;
  request["temperature"] = flags.temperature;
  request["top_p"] = flags.top_p;
  std::string text;
  absl::Status in_stream;
  const auto on_data = [&](const std::string& data) {
    if (data == "[DONE]") return false;
    const Json event = Json::parse(data, nullptr, false);
    if (!event.is_object()) return true;
    if (event.contains("error")) {
      in_stream = absl::UnavailableError(event["error"].value("message", "the server reported an error"));
      return false;
    }
    for (const Json& choice : event.value("choices", Json::array())) {
      const std::string piece = text_of(choice);
      text += piece;
      out << piece << std::flush;
    }
    return true;
  };
  MK_RETURN_IF_ERROR(HttpPostEvents(endpoint, target, request.dump(), key, kSilenceMax, on_data));
  MK_RETURN_IF_ERROR(in_stream);
  return text;
}

}  // namespace

absl::Status RunChat(const ChatFlags& flags, std::istream& in, std::ostream& out) {
  const bool person = ::isatty(STDIN_FILENO) != 0;
  Json messages = Json::array();
  if (!flags.system.empty()) messages.push_back({{"role", "system"}, {"content", flags.system}});
  if (person) out << "Talking to " << flags.url << ". Ctrl-D ends.\n";
  std::string line;
  while ((person ? (out << "> " << std::flush, true) : true) && std::getline(in, line)) {
    if (line.empty()) continue;
    messages.push_back({{"role", "user"}, {"content", line}});
    MK_ASSIGN_OR_RETURN(
        const std::string answer,
        Stream(flags, "/v1/chat/completions", {{"messages", messages}}, out, [](const Json& choice) {
          const Json delta = choice.value("delta", Json::object());
          return delta.contains("content") && delta["content"].is_string()
                     ? delta["content"].get<std::string>()
                     : "";
        }));
    messages.push_back({{"role", "assistant"}, {"content", answer}});
    out << "\n";
  }
  if (person) out << "\n";
  return absl::OkStatus();
}

absl::Status StreamCompletion(const ChatFlags& flags, const std::string& prompt, std::ostream& out) {
  return Stream(flags, "/v1/completions", {{"prompt", prompt}}, out,
                [](const Json& choice) { return choice.value("text", std::string()); })
      .status();
}

}  // namespace minke::cli
