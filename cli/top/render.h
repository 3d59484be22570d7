// One frame of `minke top`: the cluster's view (GET /cluster, docs/console.md) as lines of text. Pure
// functions.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace minke::cli::top {

struct Style {
  int columns = 100;
  int rows = 0;  // of the screen; 0: no limit
  bool color = false;
  bool utf8 = false;  // blocks and shades; else ASCII
};

// At most style.rows lines of at most style.columns characters, without newlines. `problem`: why the view is
// not the newest one; empty: it is. INVALID_ARGUMENT: not a view, or of another schema.
absl::StatusOr<std::vector<std::string>> Render(const nlohmann::json& view, const std::string& problem,
                                                const Style& style);

}  // namespace minke::cli::top
