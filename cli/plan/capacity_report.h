// What `minke plan` prints of a plan.
#pragma once

#include <ostream>
#include <string>

#include "cli/plan/search.h"
#include "nlohmann/json.hpp"

namespace minke::cli {

// `model_name`: as the reader called it, for the first line. Sizes in GB (1e9), times in ms and us.
void PrintPlan(const std::string& model_name, const CapacityModel& model, const SearchResult& result,
               std::ostream& out);
// Plain units: seconds, bytes, tokens.
nlohmann::ordered_json PlanToJson(const std::string& model_name, const CapacityModel& model,
                                  const SearchResult& result);
// One line: what bounds the plan, and what would move it.
std::string Advice(const CapacityModel& model, const Plan& plan);

}  // namespace minke::cli
