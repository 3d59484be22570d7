#include "libs/tokenizer/tokenizer.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/tokenizer/tokenizer_impl.h"
#include "libs/tokenizer/utf8.h"

namespace minke::tokenizer {

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

const Tokenizer::Impl::Literal* Tokenizer::Impl::LiteralAt(std::string_view text) const {
  for (const Literal& literal : literals[static_cast<uint8_t>(text[0])]) {
    if (text.starts_with(literal.content)) return &literal;
  }
  return nullptr;
}

absl::Status Tokenizer::Impl::EncodePlain(std::string_view text, std::vector<uint32_t>* ids) const {
  PreTokenizer::Pieces pieces;
  MK_RETURN_IF_ERROR(pre_tokenizer->Split(text, &pieces));
  for (const std::string_view piece : pieces.views) MK_RETURN_IF_ERROR(bpe->Encode(piece, ids));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view text) const {
  if (const size_t valid = ValidUtf8Prefix(text); valid != text.size()) {
    return absl::InvalidArgumentError(absl::StrCat("text is not UTF-8: byte ", valid, " of ", text.size()));
  }
  std::vector<uint32_t> ids;
  ids.reserve(text.size() / 3);
  size_t plain_begin = 0;
  if (impl_->has_literals) {
    for (size_t at = 0; at < text.size();) {
      const Impl::Literal* literal = impl_->LiteralAt(text.substr(at));
      if (literal == nullptr) {
        ++at;
        continue;
      }
      MK_RETURN_IF_ERROR(impl_->EncodePlain(text.substr(plain_begin, at - plain_begin), &ids));
      ids.push_back(literal->id);
      at += literal->content.size();
      plain_begin = at;
    }
  }
  MK_RETURN_IF_ERROR(impl_->EncodePlain(text.substr(plain_begin), &ids));
  return ids;
}

std::string_view Tokenizer::TokenBytes(uint32_t id) const {
  return id < impl_->entries.size() ? std::string_view(impl_->entries[id].bytes) : std::string_view();
}

bool Tokenizer::HasToken(uint32_t id) const {
  return id < impl_->entries.size() && impl_->entries[id].exists;
}

bool Tokenizer::IsSpecial(uint32_t id) const {
  return id < impl_->entries.size() && impl_->entries[id].special;
}

std::optional<uint32_t> Tokenizer::FindToken(std::string_view content) const {
  if (const auto found = impl_->added.find(content); found != impl_->added.end()) return found->second;
  if (const auto found = impl_->by_bytes.find(content); found != impl_->by_bytes.end()) return found->second;
  return std::nullopt;
}

uint32_t Tokenizer::id_end() const { return static_cast<uint32_t>(impl_->entries.size()); }
std::optional<uint32_t> Tokenizer::bos_id() const { return impl_->bos_id; }
std::optional<uint32_t> Tokenizer::eos_id() const { return impl_->eos_id; }
bool Tokenizer::add_bos() const { return impl_->add_bos; }

StreamingDecoder::StreamingDecoder(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {}

std::string StreamingDecoder::Push(uint32_t id) {
  if (skip_special_ && tokenizer_.IsSpecial(id)) return "";
  pending_.append(tokenizer_.TokenBytes(id));
  std::string text;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    if (step.kind == Utf8Kind::kIncomplete) break;
    text.append(step.kind == Utf8Kind::kCharacter ? rest.substr(0, step.length) : kReplacementCharacter);
    rest.remove_prefix(step.length);
  }
  pending_ = std::string(rest);
  return text;
}

std::string StreamingDecoder::Finish() {
  // What waits is the beginning of one character: a single maximal subpart.
  std::string text(pending_.empty() ? "" : kReplacementCharacter);
  pending_.clear();
  return text;
}

}  // namespace minke::tokenizer
