// Tokenizer::Load: tokenizer.json and tokenizer_config.json, every field checked.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/tokenizer/json_fields.h"
#include "libs/tokenizer/tokenizer_impl.h"
#include "libs/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace minke::tokenizer {
namespace {

using nlohmann::json;

const json& Get(const json& object, const char* name) {
  static const json null;
  const auto found = object.find(name);
  return found == object.end() ? null : *found;
}

absl::Status Unsupported(const std::string& field, const char* expected, const json& found) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": expected ", expected, ", found ", Brief(found)));
}

// Only "no normalizer" is understood: anything else would change the text under the caller's feet.
absl::Status CheckNormalizer(const json& normalizer) {
  if (normalizer.is_null()) return absl::OkStatus();
  if (normalizer.is_object() && Get(normalizer, "type") == "Sequence") {
    const json& list = Get(normalizer, "normalizers");
    if (!list.is_array()) return Unsupported("normalizer.normalizers", "an array", list);
    for (const json& step : list) MK_RETURN_IF_ERROR(CheckNormalizer(step));
    return absl::OkStatus();
  }
  return Unsupported("normalizer", "none (null or an empty Sequence)", normalizer);
}

absl::Status CheckModel(const json& model) {
  if (!model.is_object()) return Unsupported("model", "an object", model);
  if (const json& type = Get(model, "type"); !type.is_null() && type != "BPE") {
    return Unsupported("model.type", "BPE", type);
  }
  for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const json& value = Get(model, name);
    if (!value.is_null() && value != "" && value != 0)
      return Unsupported(absl::StrCat("model.", name), "none", value);
  }
  MK_ASSIGN_OR_RETURN(const bool byte_fallback, BoolField(model, "byte_fallback", false, "model"));
  if (byte_fallback) return Unsupported("model.byte_fallback", "false (a byte-level vocabulary)", true);
  return absl::OkStatus();
}

absl::StatusOr<Bpe::Merge> ParseMerge(const json& merge, const json& vocab, size_t index) {
  const std::string where = absl::StrCat("model.merges[", index, "]");
  std::string left, right;
  if (merge.is_string()) {
    const std::string text = merge.get<std::string>();
    const size_t space = text.find(' ');
    if (space == std::string::npos) return Unsupported(where, "two tokens separated by a space", merge);
    left = text.substr(0, space);
    right = text.substr(space + 1);
  } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    left = merge[0].get<std::string>();
    right = merge[1].get<std::string>();
  } else {
    return Unsupported(where, "\"a b\" or [\"a\", \"b\"]", merge);
  }
  Bpe::Merge ids{};
  for (const auto& [token, id] : {std::pair<std::string, uint32_t*>{left, &ids.left},
                                  {right, &ids.right},
                                  {left + right, &ids.result}}) {
    const auto found = vocab.find(token);
    if (found == vocab.end()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": expected tokens of model.vocab, found ",
                                                     Brief(json(token)), " that is not in it"));
    }
    *id = found->get<uint32_t>();
  }
  return ids;
}

// Text that people write never contains it by accident: role and control markers, special or not.
bool IsMarkup(std::string_view content) {
  return (content.starts_with('<') && content.ends_with('>')) ||
         (content.starts_with('[') && content.ends_with(']'));
}

struct SpecialNames {
  std::optional<std::string> bos, eos;
  std::optional<bool> add_bos;
};

// A string, or an object with "content"; null and absent: none.
absl::StatusOr<std::optional<std::string>> TokenName(const json& config, const char* field) {
  const json& value = Get(config, field);
  if (value.is_null()) return std::optional<std::string>();
  if (value.is_string()) return std::optional<std::string>(value.get<std::string>());
  if (value.is_object() && Get(value, "content").is_string()) {
    return std::optional<std::string>(value["content"].get<std::string>());
  }
  return Unsupported(field, "a string or an object with \"content\"", value);
}

absl::StatusOr<SpecialNames> ReadConfig(const std::string& path) {
  SpecialNames names;
  absl::StatusOr<json> config = ReadJsonFile(path);
  if (absl::IsNotFound(config.status())) return names;
  if (!config.ok()) return config.status();
  if (!config->is_object())
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected an object, found ", Brief(*config)));
  for (const auto& [field, name] : {std::pair{"bos_token", &names.bos}, std::pair{"eos_token", &names.eos}}) {
    auto value = TokenName(*config, field);
    if (!value.ok()) return Annotate(value.status(), path);
    *name = *std::move(value);
  }
  if (!Get(*config, "add_bos_token").is_null()) {
    auto value = BoolField(*config, "add_bos_token", false, path);
    if (!value.ok()) return value.status();
    names.add_bos = *value;
  }
  return names;
}

// The special token that a TemplateProcessing puts before a single text; empty: none.
std::string TemplateBos(const json& post_processor) {
  if (!post_processor.is_object()) return "";
  if (const json& list = Get(post_processor, "processors"); list.is_array()) {
    for (const json& step : list) {
      if (std::string bos = TemplateBos(step); !bos.empty()) return bos;
    }
  }
  const json& single = Get(post_processor, "single");
  if (Get(post_processor, "type") != "TemplateProcessing" || !single.is_array() || single.empty() ||
      !single[0].is_object()) {
    return "";
  }
  const json& token = Get(single[0], "SpecialToken");
  return token.is_object() && Get(token, "id").is_string() ? token["id"].get<std::string>() : "";
}

}  // namespace

class TokenizerLoader {
 public:
  explicit TokenizerLoader(std::string path) : path_(std::move(path)) {}

  absl::StatusOr<std::unique_ptr<Tokenizer::Impl>> Run(const json& root, const SpecialNames& names) {
    if (!root.is_object()) return Unsupported("the file", "an object", root);
    MK_RETURN_IF_ERROR(CheckNormalizer(Get(root, "normalizer")));
    MK_ASSIGN_OR_RETURN(impl_->pre_tokenizer, PreTokenizer::Parse(Get(root, "pre_tokenizer")));
    MK_RETURN_IF_ERROR(ReadModel(Get(root, "model")));
    MK_RETURN_IF_ERROR(ReadAddedTokens(Get(root, "added_tokens")));
    MK_RETURN_IF_ERROR(ChooseSpecials(names, TemplateBos(Get(root, "post_processor"))));
    return std::move(impl_);
  }

 private:
  absl::Status ReadModel(const json& model);
  absl::Status ReadAddedTokens(const json& list);
  absl::Status ReadAddedToken(const json& token, const std::string& where);
  absl::Status ChooseSpecials(const SpecialNames& names, const std::string& template_bos);

  std::string path_;
  std::unique_ptr<Tokenizer::Impl> impl_ = std::make_unique<Tokenizer::Impl>();
};

absl::Status TokenizerLoader::ReadModel(const json& model) {
  MK_RETURN_IF_ERROR(CheckModel(model));
  const json& vocab = Get(model, "vocab");
  if (!vocab.is_object() || vocab.empty())
    return Unsupported("model.vocab", "an object of tokens and ids", vocab);
  Bpe::Options options;
  for (const auto& [token, value] : vocab.items()) {
    MK_ASSIGN_OR_RETURN(const uint32_t id,
                        TokenIdValue(value, absl::StrCat("model.vocab[", Brief(json(token)), "]")));
    Tokenizer::Impl::Entry& entry = impl_->At(id);
    if (entry.exists) {
      return absl::InvalidArgumentError(
          absl::StrCat("model.vocab: expected one token per id, found id ", id, " twice"));
    }
    entry.exists = true;
    if (std::optional<std::string> bytes = TokenToBytes(token)) {
      entry.bytes = *std::move(bytes);
      options.vocab.emplace_back(entry.bytes, id);
      impl_->by_bytes.try_emplace(entry.bytes, id);
    } else {
      entry.bytes = token;  // text that was never mapped, such as <｜begin▁of▁sentence｜>
    }
  }
  const json& merges = Get(model, "merges");
  if (!merges.is_array()) return Unsupported("model.merges", "an array", merges);
  options.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    MK_ASSIGN_OR_RETURN(const Bpe::Merge merge, ParseMerge(merges[i], vocab, i));
    options.merges.push_back(merge);
  }
  MK_ASSIGN_OR_RETURN(options.ignore_merges, BoolField(model, "ignore_merges", false, "model"));
  if (const json& unknown = Get(model, "unk_token");
      unknown.is_string() && vocab.contains(unknown.get<std::string>())) {
    options.unknown_id = vocab[unknown.get<std::string>()].get<uint32_t>();
  }
  MK_ASSIGN_OR_RETURN(Bpe bpe, Bpe::Create(std::move(options)));
  impl_->bpe.emplace(std::move(bpe));
  return absl::OkStatus();
}

absl::Status TokenizerLoader::ReadAddedToken(const json& token, const std::string& where) {
  MK_ASSIGN_OR_RETURN(const std::string content, StringField(token, "content", where));
  MK_ASSIGN_OR_RETURN(const uint32_t id, TokenIdValue(Get(token, "id"), absl::StrCat(where, ".id")));
  if (content.empty()) return Unsupported(absl::StrCat(where, ".content"), "text", token);
  bool special = false, plain = true;
  MK_ASSIGN_OR_RETURN(special, BoolField(token, "special", false, where));
  for (const char* flag : {"lstrip", "rstrip", "single_word"}) {
    MK_ASSIGN_OR_RETURN(const bool set, BoolField(token, flag, false, where));
    plain = plain && !set;
  }
  const auto [existing, is_new] = impl_->added.try_emplace(content, id);
  if (!is_new && existing->second != id) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": expected one id per content, found ",
                                                   existing->second, " and ", id, " for ",
                                                   Brief(json(content))));
  }
  Tokenizer::Impl::Entry& entry = impl_->At(id);
  entry = {content, true, special};
  if (plain && !special && !IsMarkup(content)) {
    impl_->literals[static_cast<uint8_t>(content[0])].push_back({content, id});
    impl_->has_literals = true;
  }
  return absl::OkStatus();
}

absl::Status TokenizerLoader::ReadAddedTokens(const json& list) {
  if (list.is_null()) return absl::OkStatus();
  if (!list.is_array()) return Unsupported("added_tokens", "an array", list);
  for (size_t i = 0; i < list.size(); ++i) {
    MK_RETURN_IF_ERROR(ReadAddedToken(list[i], absl::StrCat("added_tokens[", i, "]")));
  }
  for (auto& literals : impl_->literals) {
    std::stable_sort(literals.begin(), literals.end(),
                     [](const auto& a, const auto& b) { return a.content.size() > b.content.size(); });
  }
  return absl::OkStatus();
}

absl::Status TokenizerLoader::ChooseSpecials(const SpecialNames& names, const std::string& template_bos) {
  const auto find = [this](const std::string& content) -> std::optional<uint32_t> {
    if (const auto found = impl_->added.find(content); found != impl_->added.end()) return found->second;
    // Older files list special tokens in the vocabulary only.
    for (uint32_t id = 0; id < impl_->entries.size(); ++id) {
      if (impl_->entries[id].exists && impl_->entries[id].bytes == content) return id;
    }
    return std::nullopt;
  };
  // What the files say comes first; without tokenizer_config.json the usual names are looked for.
  const auto choose = [&](const std::optional<std::string>& named, const char* field,
                          const std::string& from_template, std::initializer_list<const char*> usual,
                          std::optional<uint32_t>* id) -> absl::Status {
    const std::string content = named ? *named : from_template;
    if (!content.empty()) {
      *id = find(content);
      if (*id) return absl::OkStatus();
      return absl::InvalidArgumentError(
          absl::StrCat(field, ": expected a token of the vocabulary, found ", Brief(json(content))));
    }
    for (const char* name : usual) {
      const auto found = impl_->added.find(name);
      if (found == impl_->added.end() || !impl_->entries[found->second].special) continue;
      *id = found->second;
      break;
    }
    return absl::OkStatus();
  };
  MK_RETURN_IF_ERROR(choose(names.bos, "bos_token", template_bos,
                            {"<｜begin▁of▁sentence｜>", "<s>", "<bos>", "<|begin_of_text|>"},
                            &impl_->bos_id));
  MK_RETURN_IF_ERROR(choose(names.eos, "eos_token", "",
                            {"<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"},
                            &impl_->eos_id));
  for (const auto id : {impl_->bos_id, impl_->eos_id}) {
    if (!id) continue;
    Tokenizer::Impl::Entry& entry = impl_->entries[*id];
    entry.special = true;
    std::erase_if(impl_->literals[static_cast<uint8_t>(entry.bytes[0])],
                  [&](const auto& literal) { return literal.id == *id; });
  }
  impl_->add_bos = names.add_bos.value_or(!template_bos.empty());
  if (impl_->add_bos && !impl_->bos_id) {
    return absl::InvalidArgumentError("add_bos_token: expected a bos_token beside it, found none");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/tokenizer.json");
  MK_ASSIGN_OR_RETURN(const json root, ReadJsonFile(path));
  MK_ASSIGN_OR_RETURN(const SpecialNames names,
                      ReadConfig(absl::StrCat(directory, "/tokenizer_config.json")));
  auto impl = TokenizerLoader(path).Run(root, names);
  if (!impl.ok()) return Annotate(impl.status(), path);
  return std::unique_ptr<Tokenizer>(new Tokenizer(*std::move(impl)));
}

}  // namespace minke::tokenizer
