#include "cli/api_key.h"

#include <algorithm>
#include <fstream>

#include "absl/strings/ascii.h"
#include "libs/base/strings.h"

namespace minke::cli {

absl::StatusOr<std::string> FirstKey(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path);
  if (!file)
    return absl::NotFoundError(StrCat("--api-key-file: expected a file that can be read, found ", path));
  std::string line;
  while (std::getline(file, line)) {
    const std::string text(absl::StripAsciiWhitespace(line));
    if (text.empty() || text[0] == '#') continue;
    const std::string key = text.substr(0, text.find_first_of(" \t"));
    const auto printable = [](char c) { return absl::ascii_isgraph(static_cast<unsigned char>(c)); };
    if (!std::all_of(key.begin(), key.end(), printable)) break;
    return key;
  }
  return absl::InvalidArgumentError(
      StrCat("--api-key-file: expected a key of printable characters in a line, found none in ", path));
}

}  // namespace minke::cli
