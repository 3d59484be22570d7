#include "libs/tokenizer/tokenize_command.h"

#include <istream>
#include <iterator>
#include <ostream>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "libs/base/status.h"
#include "libs/tokenizer/tokenizer.h"

namespace minke::tokenizer {
namespace {

absl::StatusOr<std::string> EncodeText(const Tokenizer& tokenizer, bool bos, std::string_view text) {
  MK_ASSIGN_OR_RETURN(std::vector<uint32_t> ids, tokenizer.Encode(text));
  if (bos) ids.insert(ids.begin(), *tokenizer.bos_id());
  return absl::StrJoin(ids, " ");
}

// The tokens' own bytes, which need not be UTF-8; special tokens have none.
absl::StatusOr<std::string> DecodeIds(const Tokenizer& tokenizer, const std::string& line) {
  std::string bytes;
  for (const absl::string_view word : absl::StrSplit(line, absl::ByAnyChar(" \t\r\n"), absl::SkipEmpty())) {
    uint32_t id = 0;
    if (!absl::SimpleAtoi(word, &id) || !tokenizer.HasToken(id)) {
      return absl::InvalidArgumentError(absl::StrCat("expected token ids of the vocabulary (below ",
                                                     tokenizer.id_end(), "), found \"", word.substr(0, 40),
                                                     "\""));
    }
    if (!tokenizer.IsSpecial(id)) bytes.append(tokenizer.TokenBytes(id));
  }
  return bytes;
}

absl::Status Run(const TokenizeOptions& options, std::istream& in, std::ostream& out) {
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(options.directory));
  if (options.bos && !tokenizer->bos_id()) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.directory, ": --bos: the tokenizer has no BOS token"));
  }
  const auto convert = [&](const std::string& text) {
    return options.decode ? DecodeIds(*tokenizer, text) : EncodeText(*tokenizer, options.bos, text);
  };
  if (!options.lines) {
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    MK_ASSIGN_OR_RETURN(const std::string converted, convert(text));
    out << converted << (options.decode ? "" : "\n");
  } else {
    std::string line;
    for (size_t number = 1; std::getline(in, line); ++number) {
      absl::StatusOr<std::string> converted = convert(line);
      if (!converted.ok()) return Annotate(converted.status(), absl::StrCat("line ", number));
      // A last line without a newline stays one, in both directions: that is what makes them inverse.
      out << *converted << (in.eof() ? "" : "\n");
    }
  }
  out.flush();
  return out ? absl::OkStatus() : absl::UnavailableError("output cannot be written");
}

}  // namespace

int RunTokenizeCommand(const TokenizeOptions& options, std::istream& in, std::ostream& out,
                       std::ostream& err) {
  const absl::Status status = Run(options, in, out);
  if (status.ok()) return 0;
  out.flush();
  err << "minke tokenize: " << status.message() << "\n";
  return 1;
}

}  // namespace minke::tokenizer
