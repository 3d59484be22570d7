// Files that operators hand to the planner and the gateway: recorded loads, ceilings, API keys. The first
// byte says which. What ceilings are accepted give plans of finite numbers.
#include <cmath>
#include <set>
#include <sstream>

#include "cli/plan/ceilings.h"
#include "cli/plan/loads.h"
#include "cli/plan/published.h"
#include "cli/plan/search.h"
#include "services/gateway/keys/key_file.h"
#include "tests/fuzz/fuzz.h"

namespace {

using namespace minke::cli;

void Loads(std::string_view text) {
  minke::ModelConfig config = PublishedShape("v2-lite");
  config.num_hidden_layers = 3;
  const auto intervals = ParseLoads(config, text);
  if (!intervals.ok()) return;
  FUZZ_ASSERT(!intervals->empty());
  for (const auto& loads : *intervals) {
    FUZZ_ASSERT(loads.size() == 2 * 8);
    for (const auto& load : loads) {
      FUZZ_ASSERT(std::isfinite(load.rows) && load.rows >= 0);
      FUZZ_ASSERT(std::isfinite(load.experts) && load.experts >= 0);
    }
  }
}

void Rates(std::string_view text, bool over_h200) {
  const Ceilings base = over_h200 ? BuiltInCeilings("h200").value() : Ceilings();
  const auto parsed = ParseCeilings(text, base);
  if (!parsed.ok()) {
    FUZZ_ASSERT(!parsed.status().message().empty());
    return;
  }
  if (!CheckComplete(*parsed).ok()) return;
  static const minke::ModelConfig lite = PublishedShape("v2-lite");
  Hardware hardware;
  hardware.attention = hardware.expert = *parsed;
  const CapacityModel model(lite, hardware, {.prompt_tokens = 100, .output_tokens = 50});
  const auto result = Search(model, {.nodes_max = 2, .microbatches_max = 2});
  if (!result.ok()) return;
  const Plan& plan = result->best;
  FUZZ_ASSERT(std::isfinite(plan.step.step_s) && plan.step.step_s > 0);
  FUZZ_ASSERT(std::isfinite(plan.tokens_per_s) && plan.tokens_per_s > 0);
  FUZZ_ASSERT(model.AttentionMemory(plan.pools).share() <= 1 &&
              model.ExpertMemory(plan.pools.experts).share() <= 1);
}

// Errors never show a key; what is longer than any word of theirs would be one.
void Keys(std::string_view text, minke::gateway::KeyKind kind) {
  const auto keys = minke::gateway::ParseKeys(text, kind);
  if (!keys.ok()) {
    std::istringstream lines{std::string(text)};
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string key;
      // Where its bytes are also a name or a number, errors may show those.
      if (words >> key && key.size() >= 24 && key[0] != '#' && text.find(key) == text.rfind(key))
        FUZZ_ASSERT(keys.status().message().find(key) == absl::string_view::npos);
    }
    return;
  }
  FUZZ_ASSERT(!keys->empty() && "a file that opens the server to everybody");
  std::set<std::string> values, names;
  for (const minke::gateway::KeyEntry& entry : *keys) {
    FUZZ_ASSERT(!entry.key.empty() && values.insert(entry.key).second);
    FUZZ_ASSERT(!entry.name.empty() && names.insert(entry.name).second);
    FUZZ_ASSERT(entry.key.find_first_of(" \t\r\n") == std::string::npos);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  minke::fuzz::Input input(data, bytes);
  switch (const auto which = input.Take<uint8_t>() % 5; which) {
    case 0:
      Loads(input.rest());
      break;
    case 1:
    case 2:
      Rates(input.rest(), which == 2);
      break;
    case 3:
      Keys(input.rest(), minke::gateway::KeyKind::kApiKey);
      break;
    default:
      Keys(input.rest(), minke::gateway::KeyKind::kOperatorToken);
  }
  return 0;
}
