#include "libs/tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/tokenizer/json_fields.h"
#include "libs/tokenizer/pattern.h"
#include "nlohmann/json.hpp"

namespace minke::tokenizer {
namespace {

using nlohmann::json;

// GPT-2's own cut, used by ByteLevel with use_regex.
constexpr char kGpt2Expression[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

absl::StatusOr<Behavior> ParseBehavior(const json& object, const std::string& where) {
  MK_ASSIGN_OR_RETURN(const std::string name, StringField(object, "behavior", where));
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  return absl::InvalidArgumentError(absl::StrCat(
      where,
      ".behavior: expected Isolated, Removed, MergedWithPrevious, MergedWithNext or Contiguous, found \"",
      name, "\""));
}

absl::StatusOr<Pattern> ParsePattern(const json& object, const std::string& where) {
  const auto pattern = object.find("pattern");
  if (pattern != object.end() && pattern->is_object() && pattern->size() == 1) {
    const std::string& kind = pattern->begin().key();
    const json& value = pattern->begin().value();
    if (value.is_string() && kind == "String") return Pattern::Literal(value.get<std::string>());
    if (value.is_string() && kind == "Regex") {
      absl::StatusOr<Pattern> regex = Pattern::Regex(value.get<std::string>());
      if (!regex.ok()) return Annotate(regex.status(), absl::StrCat(where, ".pattern"));
      return regex;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat(where, ".pattern: expected {\"Regex\": string} or {\"String\": string}, found ",
                   pattern == object.end() ? "nothing" : Brief(*pattern)));
}

}  // namespace

struct PreTokenizer::Stage {
  std::optional<Pattern> pattern;  // none: only the prefix space
  Behavior behavior = Behavior::kIsolated;
  bool invert = false;
  bool add_prefix_space = false;

  // Appends the parts of `piece`; texts that had to be made go to `owned`, where they stay in place.
  absl::Status Apply(std::string_view piece, std::vector<std::string_view>* out,
                     std::deque<std::string>* owned) const;
  static absl::Status ParseInto(const json& object, const std::string& where, bool last,
                                std::vector<std::unique_ptr<Stage>>* stages);
};

absl::Status PreTokenizer::Stage::Apply(std::string_view piece, std::vector<std::string_view>* out,
                                        std::deque<std::string>* owned) const {
  if (add_prefix_space && !piece.starts_with(' ')) {
    owned->push_back(std::string(" ").append(piece));
    piece = owned->back();
  }
  if (!pattern) {
    out->push_back(piece);
    return absl::OkStatus();
  }
  std::vector<Match> matches;
  MK_RETURN_IF_ERROR(pattern->FindAll(piece, &matches));
  struct Part {
    size_t begin, end;
    bool matched;
  };
  std::vector<Part> parts;
  size_t at = 0;
  for (const Match& match : matches) {
    if (match.begin > at) parts.push_back({at, match.begin, invert});
    parts.push_back({match.begin, match.end, !invert});
    at = match.end;
  }
  if (at < piece.size()) parts.push_back({at, piece.size(), invert});

  std::vector<Part> merged;
  bool previous_matched = false;
  switch (behavior) {
    case Behavior::kIsolated:
      merged = std::move(parts);
      break;
    case Behavior::kRemoved:
      for (const Part& part : parts) {
        if (!part.matched) merged.push_back(part);
      }
      break;
    case Behavior::kMergedWithPrevious:
      for (const Part& part : parts) {
        if (part.matched && !previous_matched && !merged.empty()) {
          merged.back().end = part.end;
        } else {
          merged.push_back(part);
        }
        previous_matched = part.matched;
      }
      break;
    case Behavior::kMergedWithNext:
      for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
        if (part->matched && !previous_matched && !merged.empty()) {
          merged.back().begin = part->begin;
        } else {
          merged.push_back(*part);
        }
        previous_matched = part->matched;
      }
      std::reverse(merged.begin(), merged.end());
      break;
    case Behavior::kContiguous:
      for (const Part& part : parts) {
        if (!merged.empty() && part.matched == previous_matched) {
          merged.back().end = part.end;
        } else {
          merged.push_back(part);
        }
        previous_matched = part.matched;
      }
      break;
  }
  for (const Part& part : merged) out->push_back(piece.substr(part.begin, part.end - part.begin));
  return absl::OkStatus();
}

absl::Status PreTokenizer::Stage::ParseInto(const json& object, const std::string& where, bool last,
                                            std::vector<std::unique_ptr<Stage>>* stages) {
  MK_ASSIGN_OR_RETURN(const std::string type, StringField(object, "type", where));
  if (type == "Sequence") {
    const auto list = object.find("pretokenizers");
    if (list == object.end() || !list->is_array()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ".pretokenizers: expected an array, found ",
                                                     list == object.end() ? "nothing" : Brief(*list)));
    }
    for (size_t i = 0; i < list->size(); ++i) {
      MK_RETURN_IF_ERROR(ParseInto((*list)[i], absl::StrCat(where, ".pretokenizers[", i, "]"),
                                   last && i + 1 == list->size(), stages));
    }
    return absl::OkStatus();
  }
  auto stage = std::make_unique<Stage>();
  if (type == "Split") {
    MK_ASSIGN_OR_RETURN(stage->behavior, ParseBehavior(object, where));
    MK_ASSIGN_OR_RETURN(stage->invert, BoolField(object, "invert", false, where));
    absl::StatusOr<Pattern> pattern = ParsePattern(object, where);
    if (!pattern.ok()) return pattern.status();
    stage->pattern.emplace(*std::move(pattern));
  } else if (type == "Digits") {
    MK_ASSIGN_OR_RETURN(const bool individual, BoolField(object, "individual_digits", false, where));
    stage->behavior = individual ? Behavior::kIsolated : Behavior::kContiguous;
    stage->pattern.emplace(*Pattern::Regex("\\p{N}"));
  } else if (type == "ByteLevel") {
    if (!last) {
      // What comes after it would see the byte map's characters instead of the text.
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": expected ByteLevel to be the last pre-tokenizer"));
    }
    MK_ASSIGN_OR_RETURN(stage->add_prefix_space, BoolField(object, "add_prefix_space", true, where));
    MK_ASSIGN_OR_RETURN(const bool use_regex, BoolField(object, "use_regex", true, where));
    if (use_regex) stage->pattern.emplace(*Pattern::Regex(kGpt2Expression));
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ".type: expected Sequence, Split, Digits or ByteLevel, found \"", type, "\""));
  }
  stages->push_back(std::move(stage));
  return absl::OkStatus();
}

PreTokenizer::PreTokenizer() = default;
PreTokenizer::~PreTokenizer() = default;

absl::StatusOr<std::unique_ptr<PreTokenizer>> PreTokenizer::Parse(const json& pre_tokenizer) {
  std::unique_ptr<PreTokenizer> result(new PreTokenizer);
  MK_RETURN_IF_ERROR(Stage::ParseInto(pre_tokenizer, "pre_tokenizer", true, &result->stages_));
  const json* last = &pre_tokenizer;
  while (last->value("type", "") == "Sequence" && !last->at("pretokenizers").empty()) {
    last = &last->at("pretokenizers").back();
  }
  if (last->value("type", "") != "ByteLevel") {
    return absl::InvalidArgumentError(absl::StrCat(
        "pre_tokenizer: expected ByteLevel as the last step (a byte-level tokenizer), found ", Brief(*last)));
  }
  // ByteLevel without a pattern and a prefix space changes nothing that is left to do here.
  std::erase_if(result->stages_,
                [](const auto& stage) { return !stage->pattern && !stage->add_prefix_space; });
  return result;
}

absl::Status PreTokenizer::Split(std::string_view text, Pieces* pieces) const {
  if (text.empty()) return absl::OkStatus();
  std::vector<std::string_view> current = {text};
  std::vector<std::string_view> next;
  for (const auto& stage : stages_) {
    next.clear();
    next.reserve(current.size() * 2);
    for (const std::string_view piece : current)
      MK_RETURN_IF_ERROR(stage->Apply(piece, &next, &pieces->owned));
    current.swap(next);
  }
  pieces->views.insert(pieces->views.end(), current.begin(), current.end());
  return absl::OkStatus();
}

}  // namespace minke::tokenizer
