#include "libs/tokenizer/chat_template.h"

#include <fstream>
#include <optional>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/tokenizer/json_fields.h"
#include "nlohmann/json.hpp"

namespace minke::tokenizer {
namespace {

using nlohmann::json;

constexpr char kUserToken[] = "<｜User｜>";
constexpr char kAssistantToken[] = "<｜Assistant｜>";

// The template text of tokenizer_config.json (a string, or a list of named ones of which "default" counts),
// or of the chat_template.jinja that newer checkpoints have beside it.
absl::StatusOr<std::string> TemplateText(const std::string& directory) {
  absl::StatusOr<json> config = ReadJsonFile(absl::StrCat(directory, "/tokenizer_config.json"));
  if (!config.ok() && !absl::IsNotFound(config.status())) return config.status();
  if (config.ok() && config->is_object() && config->contains("chat_template")) {
    const json& value = (*config)["chat_template"];
    if (value.is_string()) return value.get<std::string>();
    if (value.is_array()) {
      for (const json& entry : value) {
        if (entry.is_object() && entry.value("name", json()) == "default" && entry.contains("template") &&
            entry["template"].is_string()) {
          return entry["template"].get<std::string>();
        }
      }
    }
    if (!value.is_null()) {
      return absl::InvalidArgumentError(absl::StrCat(
          directory, "/tokenizer_config.json: chat_template: expected a string, found ", Brief(value)));
    }
  }
  if (std::ifstream file(absl::StrCat(directory, "/chat_template.jinja"), std::ios::binary); file) {
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }
  return absl::NotFoundError(absl::StrCat(directory, "/tokenizer_config.json: no chat_template"));
}

// Collects ids; plain text is encoded in the longest runs between special tokens, as one text would be.
class PromptBuilder {
 public:
  explicit PromptBuilder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void Text(std::string_view text) { text_.append(text); }

  absl::Status Special(std::optional<uint32_t> id, const char* name) {
    if (!id)
      return absl::InvalidArgumentError(
          absl::StrCat("the chat template needs ", name, ", which the tokenizer lacks"));
    MK_RETURN_IF_ERROR(Flush());
    ids_.push_back(*id);
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<uint32_t>> Finish() {
    MK_RETURN_IF_ERROR(Flush());
    return std::move(ids_);
  }

 private:
  absl::Status Flush() {
    if (text_.empty()) return absl::OkStatus();
    MK_ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, tokenizer_.Encode(text_));
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    text_.clear();
    return absl::OkStatus();
  }

  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<uint32_t> ids_;
};

enum class Role { kSystem, kUser, kAssistant };

absl::StatusOr<Role> ParseRole(const std::string& role) {
  if (role == "system") return Role::kSystem;
  if (role == "user") return Role::kUser;
  if (role == "assistant") return Role::kAssistant;
  return absl::InvalidArgumentError(
      absl::StrCat("role: expected system, user or assistant, found ", Brief(json(role))));
}

// How one template writes a turn.
struct Style {
  bool roles_are_tokens;   // <｜User｜> and <｜Assistant｜>, else "User: " and "Assistant: "
  bool system_goes_first;  // only the last system message, before every other turn, with nothing after it
};

Style StyleOf(ChatTemplate chat_template) {
  switch (chat_template) {  // no default: a new template must be described
    case ChatTemplate::kV2Chat:
      return {false, false};
    case ChatTemplate::kV2Chat0628:
      return {true, false};
    case ChatTemplate::kV2_5:
      return {true, true};
  }
  return {};
}

}  // namespace

absl::StatusOr<ChatTemplate> ParseChatTemplate(std::string_view name) {
  if (name == "v2-chat") return ChatTemplate::kV2Chat;
  if (name == "v2-chat-0628") return ChatTemplate::kV2Chat0628;
  if (name == "v2.5") return ChatTemplate::kV2_5;
  return absl::InvalidArgumentError(absl::StrCat(
      "chat template: expected v2-chat, v2-chat-0628 or v2.5, found \"", std::string(name), "\""));
}

absl::StatusOr<ChatTemplate> DetectChatTemplate(const std::string& checkpoint_directory) {
  MK_ASSIGN_OR_RETURN(const std::string text, TemplateText(checkpoint_directory));
  const auto has = [&text](std::string_view part) { return text.find(part) != std::string::npos; };
  if (!has("<think>")) {  // the reasoning models' templates otherwise look like V2.5's
    if (has(kUserToken) && has(kAssistantToken)) {
      return has("system_prompt") ? ChatTemplate::kV2_5 : ChatTemplate::kV2Chat0628;
    }
    if (has("User: ") && has("Assistant:")) return ChatTemplate::kV2Chat;
  }
  return absl::InvalidArgumentError(
      absl::StrCat(checkpoint_directory,
                   "/tokenizer_config.json: chat_template: expected that of DeepSeek-V2-Chat, "
                   "V2-Chat-0628 or V2.5, found ",
                   Brief(json(text))));
}

absl::StatusOr<std::vector<uint32_t>> RenderChat(const Tokenizer& tokenizer, ChatTemplate chat_template,
                                                 const std::vector<ChatMessage>& messages) {
  if (messages.empty()) return absl::InvalidArgumentError("expected at least one message, found none");
  const Style style = StyleOf(chat_template);
  const auto user = style.roles_are_tokens ? tokenizer.FindToken(kUserToken) : std::nullopt;
  const auto assistant = style.roles_are_tokens ? tokenizer.FindToken(kAssistantToken) : std::nullopt;

  PromptBuilder prompt(tokenizer);
  MK_RETURN_IF_ERROR(prompt.Special(tokenizer.bos_id(), "a BOS token"));
  if (style.system_goes_first) {
    std::string_view system;
    for (const ChatMessage& message : messages) {
      if (message.role == "system") system = message.content;
    }
    prompt.Text(system);
  }
  for (const ChatMessage& message : messages) {
    MK_ASSIGN_OR_RETURN(const Role role, ParseRole(message.role));
    switch (role) {
      case Role::kSystem:
        if (!style.system_goes_first) prompt.Text(absl::StrCat(message.content, "\n\n"));
        break;
      case Role::kUser:
        if (style.roles_are_tokens) {
          MK_RETURN_IF_ERROR(prompt.Special(user, kUserToken));
          prompt.Text(message.content);
        } else {
          prompt.Text(absl::StrCat("User: ", message.content, "\n\n"));
        }
        break;
      case Role::kAssistant:
        if (style.roles_are_tokens) {
          MK_RETURN_IF_ERROR(prompt.Special(assistant, kAssistantToken));
          prompt.Text(message.content);
        } else {
          prompt.Text(absl::StrCat("Assistant: ", message.content));
        }
        MK_RETURN_IF_ERROR(prompt.Special(tokenizer.eos_id(), "an EOS token"));
        break;
    }
  }
  if (style.roles_are_tokens) {
    MK_RETURN_IF_ERROR(prompt.Special(assistant, kAssistantToken));
  } else {
    prompt.Text("Assistant:");  // no space: the model begins with it
  }
  return prompt.Finish();
}

}  // namespace minke::tokenizer
