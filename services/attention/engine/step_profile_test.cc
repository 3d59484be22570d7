#include "services/attention/engine/step_profile.h"

#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <thread>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace minke::attention {
namespace {

TEST(StepProfile, EveryMomentBelongsToOnePhase) {
  const auto begin = std::chrono::steady_clock::now();
  StepProfile profile("", 0);
  for (int i = 0; i < 20; ++i) {
    profile.Enter(StepPhase::kAttention, i);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    profile.Enter(StepPhase::kWait, i);
  }
  profile.Enter(StepPhase::kIdle);
  const double all = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_GE(profile.seconds()[static_cast<int>(StepPhase::kAttention)], 0.02);
  EXPECT_EQ(profile.seconds()[static_cast<int>(StepPhase::kHead)], 0.0);
  const double sum = std::accumulate(profile.seconds().begin(), profile.seconds().end(), 0.0);
  EXPECT_LE(sum, all);
  EXPECT_GT(sum, 0.9 * all);
}

TEST(StepProfile, TraceIsWrittenAfterItsSteps) {
  const std::string file = (std::filesystem::temp_directory_path() / "minke_step_trace.json").string();
  std::filesystem::remove(file);
  {
    StepProfile profile(file, 2);
    for (int step = 0; step < 5; ++step) {
      profile.StepBegins(7);
      profile.Enter(StepPhase::kAttention, 3);
      profile.Enter(StepPhase::kHead);
      profile.Enter(StepPhase::kPlan);
      EXPECT_EQ(std::filesystem::exists(file), step >= 2);
    }
  }
  std::ifstream in(file);
  const auto trace = nlohmann::json::parse(in);
  ASSERT_EQ(trace["traceEvents"].size(), 6u);  // three stays in each of two steps
  EXPECT_EQ(trace["traceEvents"][1]["name"], "attention");
  EXPECT_EQ(trace["traceEvents"][1]["args"]["layer"], 3);
  EXPECT_EQ(trace["traceEvents"][1]["args"]["rows"], 7);
  EXPECT_GE(trace["traceEvents"][1]["dur"], 0.0);
  std::filesystem::remove(file);
}

}  // namespace
}  // namespace minke::attention
