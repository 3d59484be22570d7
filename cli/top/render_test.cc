#include "cli/top/render.h"

#include "absl/strings/str_format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::cli::top {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

json Member(const std::string& id, const std::string& state, json load) {
  return {
      {"id", id},         {"address", "127.0.0.1:7000"}, {"pid", 7}, {"state", state}, {"detail", nullptr},
      {"since_ms", 1000}, {"load", std::move(load)}};
}

// `servers` experts and `layers` layers under load.
json View(int servers = 2, int layers = 3) {
  json experts = json::array(), ids = json::array(), numbers = json::array(), rows = json::array();
  for (int s = 0; s < servers; ++s) {
    const std::string id = absl::StrFormat("e%07d00000000", s);
    ids.push_back(id);
    experts.push_back(Member(id, "ready", {{"rows_per_s", 12345.6}, {"queued_rows", 3}, {"units", 28}}));
  }
  for (int l = 0; l < layers; ++l) {
    numbers.push_back(l + 1);
    rows.push_back(json::array());
    for (int s = 0; s < servers; ++s) rows.back().push_back(100.0 * (l + 1));
  }
  return {{"schema", 1},
          {"time_ms", 61000},
          {"model", {{"name", "small"}}},
          {"ready", true},
          {"not_ready_reason", nullptr},
          {"registry_connected", true},
          {"epoch", {{"term", 17}, {"counter", 4}}},
          {"leader", "a000000000000001"},
          {"pools",
           {{{"name", "gateways"},
             {"role", "gateway"},
             {"health", "down"},
             {"ready", 0},
             {"members", json::array()}},
            {{"name", "attention"},
             {"role", "attention"},
             {"health", "degraded"},
             {"ready", 1},
             {"members",
              {Member("b000000000000001", "ready",
                      {{"running", 5},
                       {"waiting", 2},
                       {"tokens_per_s", 321.5},
                       {"cache_pages_used", 50},
                       {"cache_pages_total", 200}}),
               Member("b000000000000002", "lost", json::object())}}},
            {{"name", "routers"},
             {"role", "router"},
             {"health", "ok"},
             {"ready", 1},
             {"members", {Member("a000000000000001", "ready", {{"rows_per_s", 7}})}}},
            {{"name", "experts"},
             {"role", "expert"},
             {"health", "ok"},
             {"ready", servers},
             {"members", experts}}}},
          {"heat", {{"servers_total", servers}, {"layers", numbers}, {"servers", ids}, {"rows_per_s", rows}}},
          {"traffic",
           {{"sequences", 5},
            {"tokens_per_s", 321.5},
            {"failed", 2},
            {"first_token_ms", {{"p50", 45.2}, {"p95", 1234}}},
            {"token_ms", {{"p50", 4.56}, {"p95", nullptr}}},
            {"series", {{"tokens", {0, 10, 20, 40}}}}}},
          {"events",
           {{{"time_ms", 5000}, {"kind", "joined"}, {"text", "first"}},
            {{"time_ms", 6000}, {"kind", "lost"}, {"text", "second"}}}}};
}

std::vector<std::string> Lines(const json& view, const Style& style, const std::string& problem = "") {
  auto lines = Render(view, problem, style);
  EXPECT_TRUE(lines.ok()) << lines.status();
  return lines.ok() ? *lines : std::vector<std::string>();
}

size_t Width(const std::string& line) {
  return static_cast<size_t>(std::count_if(
      line.begin(), line.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

TEST(TopRender, WhatIsNoViewIsOneClearError) {
  EXPECT_THAT(Render(json::array(), "", {}).status().message(), HasSubstr("expected a cluster's view"));
  EXPECT_THAT(Render(json(json::value_t::discarded), "", {}).status().message(),
              HasSubstr("expected a cluster's view"));
  EXPECT_THAT(Render({{"schema", 2}}, "", {}).status().message(), HasSubstr("expected schema 1, found 2"));
  EXPECT_FALSE(Render({{"schema", 1}}, "", {}).ok());
  json broken = View();
  broken["heat"]["layers"] = "none";
  EXPECT_FALSE(Render(broken, "", {}).ok());
}

TEST(TopRender, ShowsWhatMatters) {
  const std::vector<std::string> lines = Lines(View(), {});
  EXPECT_THAT(lines[0], AllOf(HasSubstr("Minke small  serving  epoch 17.4  leader a0000000")));
  EXPECT_THAT(
      lines,
      Contains(HasSubstr("322 tokens/s  first 45 ms (95%: 1.2 s)  each 4.6 ms (95%: -)  5 open  2 failed")));
  EXPECT_THAT(lines, Contains(HasSubstr("attention  1 ready, degraded")));
  EXPECT_THAT(lines, Contains(AllOf(HasSubstr("b0000000 ready"),
                                    HasSubstr("5 running  2 waiting  322 tokens/s  cache 25.0%"))));
  EXPECT_THAT(lines, Contains(AllOf(HasSubstr("b0000000 lost"), HasSubstr("60 s ago"))));
  EXPECT_THAT(lines, Contains(AllOf(HasSubstr("a0000000 ready leads"), HasSubstr("7 rows/s"))));
  EXPECT_THAT(lines, Contains(HasSubstr("12.3k rows/s  3 queued  28 units")));
  EXPECT_THAT(lines, Contains(HasSubstr("    2        200      200")));
  const auto first =
      std::find_if(lines.begin(), lines.end(), [](const std::string& l) { return l.ends_with("  first"); });
  const auto second =
      std::find_if(lines.begin(), lines.end(), [](const std::string& l) { return l.ends_with("  second"); });
  ASSERT_TRUE(first != lines.end() && second != lines.end());
  EXPECT_LT(second, first);  // newest on top
}

TEST(TopRender, PlainMeansAsciiAndNoEscapes) {
  for (const std::string& line : Lines(View(), {})) {
    for (const char c : line) EXPECT_TRUE(c >= ' ' && c < 0x7f) << line;
  }
}

TEST(TopRender, TroubleIsColored) {
  const std::vector<std::string> lines = Lines(View(), {.color = true});
  EXPECT_THAT(lines, Contains(HasSubstr("\x1b[1;31mlost\x1b[0m")));
  EXPECT_THAT(lines, Contains(HasSubstr("\x1b[32mready\x1b[0m")));
  EXPECT_THAT(lines, Contains(HasSubstr("\x1b[38;5;16;48;5;51m")));  // the hottest cell
}

TEST(TopRender, FitsEveryScreen) {
  const json large = View(64, 59);
  for (int columns = 1; columns < 220; columns += 7) {
    for (int rows = 1; rows < 130; rows += 5) {
      const std::vector<std::string> lines = Lines(large, {.columns = columns, .rows = rows, .utf8 = true});
      EXPECT_LE(std::ssize(lines), rows);
      for (const std::string& line : lines) EXPECT_LE(Width(line), static_cast<size_t>(columns)) << line;
    }
  }
}

TEST(TopRender, ASmallScreenKeepsTroubleAndGroupsLayers) {
  json view = View(40, 59);
  view["pools"][3]["members"][33]["state"] = "lost";
  const std::vector<std::string> lines = Lines(view, {.columns = 100, .rows = 50});
  EXPECT_THAT(lines, Contains(HasSubstr("of 40 shown)")));
  EXPECT_THAT(lines, Contains(HasSubstr("e0000033 lost")));
  EXPECT_THAT(lines, Contains(HasSubstr("  1-")));
  EXPECT_THAT(lines, Contains("events"));
}

TEST(TopRender, ProblemsAreOnTop) {
  json view = View();
  view["ready"] = false;
  view["not_ready_reason"] = "waiting for experts";
  view["registry_connected"] = false;
  const std::vector<std::string> lines = Lines(view, {}, "connection refused; trying again");
  EXPECT_THAT(lines[0], HasSubstr("not ready"));
  EXPECT_EQ(lines[1], "connection refused; trying again");
  EXPECT_EQ(lines[2], "waiting for experts");
  EXPECT_THAT(lines[3], HasSubstr("registry does not answer"));
}

TEST(TopRender, AnIdleClusterWithoutExpertsHasNoHeatMap) {
  json view = View(0, 0);
  EXPECT_THAT(Lines(view, {}), Not(Contains(HasSubstr("layer x server"))));
}

}  // namespace
}  // namespace minke::cli::top
