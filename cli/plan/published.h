// The published shapes by name, for planning without a checkpoint at hand.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/model/config.h"

namespace minke::cli {

// "v2" and "v2-lite", also as "deepseek-v2" and "deepseek-v2-lite".
const std::vector<std::string>& PublishedNames();
// REQUIRES: one of the names.
ModelConfig PublishedShape(std::string_view name);

// Of `checkpoint`/config.json if that is not empty, else published. INVALID_ARGUMENT without routed experts.
absl::StatusOr<ModelConfig> ShapeToPlan(const std::string& checkpoint, const std::string& name);

}  // namespace minke::cli
