// `minke tokenize DIR [--lines] [--bos] [--decode]`: text to ids and back, for shell pipelines
// (docs/tokenizer.md).
#pragma once

#include <iosfwd>
#include <string>

namespace minke::tokenizer {

struct TokenizeOptions {
  std::string directory;  // holds tokenizer.json
  bool lines = false;     // one line of ids per line of text; without: all of the text on one line
  bool bos = false;       // BOS first, on every line
  bool decode = false;    // ids to text
};

// Reads `in` to its end. Returns the exit code: 0, or 1 with one line on `err`; what was finished before the
// error is on `out`.
int RunTokenizeCommand(const TokenizeOptions& options, std::istream& in, std::ostream& out,
                       std::ostream& err);

}  // namespace minke::tokenizer
