#include "cli/bench/json_output.h"

#include <fstream>
#include <iostream>

#include "libs/base/strings.h"

namespace minke::cli::bench {

absl::Status CheckWritable(const std::string& json_flag) {
  if (json_flag.empty() || json_flag == "-") return absl::OkStatus();
  if (std::ofstream(json_flag, std::ios::app)) return absl::OkStatus();
  return absl::InvalidArgumentError(StrCat("--json: cannot write ", json_flag));
}

absl::Status WriteJson(const std::string& json_flag, const std::string& text, std::ostream& out) {
  if (json_flag.empty()) return absl::OkStatus();
  if (json_flag == "-") {
    out << text << std::flush;
    return absl::OkStatus();
  }
  std::ofstream file(json_flag, std::ios::trunc);
  file << text;
  file.close();
  if (!file) return absl::UnavailableError(StrCat("--json: cannot write ", json_flag));
  return absl::OkStatus();
}

std::ostream& TableStream(const std::string& json_flag, std::ostream& out) {
  return json_flag == "-" ? std::cerr : out;
}

}  // namespace minke::cli::bench
