// Where --json of the bench verbs goes.
#pragma once

#include <ostream>
#include <string>

#include "absl/status/status.h"

namespace minke::cli::bench {

// Before the run, so that an hour's result does not end in a folder that is not there. OK for "" and "-".
absl::Status CheckWritable(const std::string& json_flag);
// To the file; to `out` if the flag is "-"; nowhere if it is empty.
absl::Status WriteJson(const std::string& json_flag, const std::string& text, std::ostream& out);
// The stream of what is for people: stderr if the JSON takes `out`.
std::ostream& TableStream(const std::string& json_flag, std::ostream& out);

}  // namespace minke::cli::bench
