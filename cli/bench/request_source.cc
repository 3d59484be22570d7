#include "cli/bench/request_source.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "absl/strings/ascii.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"

namespace minke::cli::bench {
namespace {

using Json = nlohmann::json;

constexpr int64_t kFileBytesMax = int64_t{1} << 30;

// Frequent, so one token each in most vocabularies: 3.2 letters on average and a space, about the 4
// characters a token of the default --chars-per-token.
constexpr std::array<std::string_view, 64> kWords = {
    "the",   "of",   "and",  "to",   "in",    "is",   "you", "that",  "it",    "he",   "was",  "for", "on",
    "are",   "as",   "with", "his",  "they",  "I",    "at",  "be",    "this",  "have", "from", "or",  "one",
    "had",   "by",   "word", "but",  "not",   "what", "all", "were",  "we",    "when", "your", "can", "said",
    "there", "use",  "an",   "each", "which", "she",  "do",  "how",   "their", "if",   "will", "up",  "other",
    "out",   "many", "then", "them", "so",    "some", "her", "would", "make",  "like", "him",  "two"};

bool IsContinuationByte(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error))
    return absl::NotFoundError(StrCat("--prompt-file: ", path, " is no file"));
  if (static_cast<int64_t>(std::filesystem::file_size(path, error)) > kFileBytesMax)
    return absl::InvalidArgumentError(
        StrCat("--prompt-file: ", path, " is larger than ", kFileBytesMax, " bytes"));
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) return absl::NotFoundError(StrCat("--prompt-file: ", path, " cannot be read"));
  return text;
}

// `json` as text; bytes that are no UTF-8 are replaced instead of thrown about.
std::string Dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

absl::StatusOr<LengthDistribution> ParseLengths(const std::string& flag, const std::string& spec) {
  absl::StatusOr<LengthDistribution> lengths = LengthDistribution::Parse(spec);
  if (!lengths.ok()) return Annotate(lengths.status(), flag);
  return lengths;
}

}  // namespace

struct RequestSource::Recorded {
  std::vector<Json> bodies;
};

namespace {

absl::StatusOr<std::vector<Json>> ParseRecorded(const std::string& path, const std::string& text) {
  std::vector<Json> bodies;
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line(text.data() + begin, end - begin);
    begin = end + 1;
    ++number;
    if (absl::StripAsciiWhitespace(AbslView(line)).empty()) continue;
    Json body = Json::parse(line, nullptr, false);
    if (body.is_object() && body.contains("body"))
      body = Json(body["body"]);  // a line of OpenAI's batch format
    if (!body.is_object() || body.contains("prompt") == body.contains("messages")) {
      return absl::InvalidArgumentError(
          StrCat("--prompt-file: ", path, ":", number,
                 ": expected a JSON object with either \"prompt\" or \"messages\""));
    }
    bodies.push_back(std::move(body));
  }
  if (bodies.empty())
    return absl::InvalidArgumentError(StrCat("--prompt-file: ", path, ": expected requests, found none"));
  return bodies;
}

absl::Status Validate(const RequestOptions& options) {
  const bool from_file = options.source == PromptSource::kText || options.source == PromptSource::kJsonl;
  if (from_file == options.prompt_file.empty()) {
    return absl::InvalidArgumentError(from_file ? "--prompt-file: this --prompt-source needs it"
                                                : "--prompt-file: only for --prompt-source text and jsonl");
  }
  if (options.source == PromptSource::kRandomIds && options.chat)
    return absl::InvalidArgumentError("--prompt-source random-ids: only with --endpoint completions");
  if (options.source == PromptSource::kJsonl && options.shared_prefix_tokens > 0)
    return absl::InvalidArgumentError("--shared-prefix-tokens: not with --prompt-source jsonl");
  if (options.token_id_min > options.token_id_max || options.token_id_min < 0) {
    return absl::InvalidArgumentError(
        StrCat("--token-ids: expected MIN:MAX, found ", options.token_id_min, ":", options.token_id_max));
  }
  if (!options.extra_body.empty() && !Json::parse(options.extra_body, nullptr, false).is_object())
    return absl::InvalidArgumentError(
        StrCat("--extra-body: expected a JSON object, found ", options.extra_body));
  return absl::OkStatus();
}

}  // namespace

RequestSource::RequestSource(RequestOptions options, LengthDistribution prompt, LengthDistribution output)
    : options_(std::move(options)), prompt_tokens_(std::move(prompt)), output_tokens_(std::move(output)) {}
RequestSource::~RequestSource() = default;
RequestSource::RequestSource(RequestSource&&) noexcept = default;

absl::StatusOr<RequestSource> RequestSource::Create(RequestOptions options) {
  MK_RETURN_IF_ERROR(Validate(options));
  MK_ASSIGN_OR_RETURN(LengthDistribution prompt, ParseLengths("--prompt-tokens", options.prompt_tokens));
  MK_ASSIGN_OR_RETURN(LengthDistribution output, ParseLengths("--output-tokens", options.output_tokens));
  RequestSource source(std::move(options), std::move(prompt), std::move(output));
  const RequestOptions& o = source.options_;
  if (!o.prompt_file.empty()) {
    MK_ASSIGN_OR_RETURN(std::string text, ReadFile(o.prompt_file));
    if (o.source == PromptSource::kJsonl) {
      MK_ASSIGN_OR_RETURN(std::vector<Json> bodies, ParseRecorded(o.prompt_file, text));
      source.recorded_ = std::make_unique<Recorded>(Recorded{std::move(bodies)});
    } else {
      if (text.empty())
        return absl::InvalidArgumentError(StrCat("--prompt-file: ", o.prompt_file, " is empty"));
      source.text_ = std::move(text);
    }
  }
  if (o.shared_prefix_tokens > 0) {
    Random random(o.seed, Draw::kSharedPrefix, 0);
    source.shared_prefix_ = o.source == PromptSource::kRandomIds
                                ? source.RandomIds(random, o.shared_prefix_tokens) + ","
                                : source.Text(random, o.shared_prefix_tokens);
  }
  return source;
}

Request RequestSource::Make(int64_t index, const std::string& model) const {
  Random prompt_random(options_.seed, Draw::kPromptTokens, index);
  Random output_random(options_.seed, Draw::kOutputTokens, index);
  Random random(options_.seed, Draw::kPrompt, index);
  const int64_t prompt_tokens = prompt_tokens_.Sample(prompt_random);
  const int64_t output_tokens = output_tokens_.Sample(output_random);

  Json body = Json::object();
  bool chat = options_.chat;
  if (options_.source == PromptSource::kJsonl) {
    const auto count = static_cast<int64_t>(recorded_->bodies.size());
    body = recorded_->bodies[static_cast<size_t>((index % count + count) % count)];
    chat = body.contains("messages");
    if (!body.contains("max_tokens") && !body.contains("max_completion_tokens"))
      body["max_tokens"] = output_tokens;
    if (!body.contains("temperature")) body["temperature"] = options_.temperature;
    body.erase("stream_options");
  } else {
    body["max_tokens"] = output_tokens;
    body["temperature"] = options_.temperature;
  }
  body["model"] = model;
  body["stream"] = true;
  if (options_.stream_usage) body["stream_options"] = {{"include_usage", true}};
  if (options_.ignore_eos) body["ignore_eos"] = true;
  if (options_.return_token_ids) body["return_token_ids"] = true;
  if (!options_.extra_body.empty()) body.update(Json::parse(options_.extra_body));

  Request request{.path = chat ? "/chat/completions" : "/completions"};
  if (options_.source == PromptSource::kJsonl) {
    request.body = Dump(body);
    return request;
  }
  request.prompt_tokens = options_.shared_prefix_tokens + prompt_tokens;
  if (options_.source == PromptSource::kRandomIds) {
    // Thousands of numbers: appended as text, not made into a JSON tree first.
    request.body = Dump(body);
    request.body.pop_back();
    StrAppend(&request.body, ",\"prompt\":[", shared_prefix_, RandomIds(random, prompt_tokens), "]}");
    return request;
  }
  const std::string text = shared_prefix_ + Text(random, prompt_tokens);
  if (chat) {
    body["messages"] = Json::array({{{"role", "user"}, {"content", text}}});
  } else {
    body["prompt"] = text;
  }
  request.body = Dump(body);
  return request;
}

std::string RequestSource::RandomIds(Random& random, int64_t tokens) const {
  std::string ids;
  ids.reserve(static_cast<size_t>(tokens) * 6);
  for (int64_t i = 0; i < tokens; ++i)
    StrAppend(&ids, i == 0 ? "" : ",", random.Between(options_.token_id_min, options_.token_id_max));
  return ids;
}

std::string RequestSource::Text(Random& random, int64_t tokens) const {
  const auto bytes =
      static_cast<size_t>(std::max(1.0, std::round(static_cast<double>(tokens) * options_.chars_per_token)));
  std::string text;
  text.reserve(bytes + 8);
  if (options_.source == PromptSource::kWords) {
    while (text.size() < bytes) {
      text += kWords[static_cast<size_t>(random.Between(0, kWords.size() - 1))];
      text += ' ';
    }
    text.resize(bytes);
    return text;
  }
  // A passage from a random place, and on from the file's begin where it ends; it begins and ends with whole
  // characters (a file that is no UTF-8 may have none: at most 3 bytes are looked through).
  auto at = static_cast<size_t>(random.Between(0, static_cast<int64_t>(text_.size()) - 1));
  for (int i = 0; i < 3 && IsContinuationByte(text_[at]); ++i) at = (at + 1) % text_.size();
  while (text.size() < bytes) {
    const size_t piece = std::min(bytes - text.size(), text_.size() - at);
    text.append(text_, at, piece);
    at = (at + piece) % text_.size();
  }
  for (int i = 0; i < 3 && IsContinuationByte(text_[at]); ++i) {
    text += text_[at];
    at = (at + 1) % text_.size();
  }
  return text;
}

}  // namespace minke::cli::bench
