#include "cli/top/render.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string_view>

#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "libs/base/strings.h"

namespace minke::cli::top {
namespace {

using Json = nlohmann::json;

constexpr int64_t kSchema = 1;
constexpr int kEventsMin = 4, kEventsMax = 12;

enum class Color { kPlain, kDim, kBold, kGood, kWarn, kBad };

const char* Code(Color color) {
  switch (color) {
    case Color::kPlain:
      return "";
    case Color::kDim:
      return "\x1b[2m";
    case Color::kBold:
      return "\x1b[1m";
    case Color::kGood:
      return "\x1b[32m";
    case Color::kWarn:
      return "\x1b[33m";
    case Color::kBad:
      return "\x1b[1;31m";
  }
  return "";
}

std::string Number(double value) {
  if (value >= 1e6) return absl::StrFormat("%.1fM", value / 1e6);
  if (value >= 1e4) return absl::StrFormat("%.1fk", value / 1e3);
  return value >= 100 || value == std::floor(value) ? absl::StrFormat("%.0f", value)
                                                    : absl::StrFormat("%.1f", value);
}

std::string Time(const Json& ms) {
  if (!ms.is_number()) return "-";
  const double value = ms.get<double>();
  return value >= 1000 ? absl::StrFormat("%.1f s", value / 1000)
                       : absl::StrFormat(value < 10 ? "%.1f ms" : "%.0f ms", value);
}

std::string Clock(int64_t unix_ms) {
  return absl::FormatTime("%H:%M:%S", absl::FromUnixMillis(unix_ms), absl::LocalTimeZone());
}

std::string ShortId(const Json& id) { return id.is_string() ? id.get<std::string>().substr(0, 8) : "-"; }

std::string TextOr(const Json& value, const std::string& otherwise) {
  return value.is_string() ? value.get<std::string>() : otherwise;
}

// One line that grows piece by piece and never gets wider than the screen. Every glyph used is one column
// wide.
class Line {
 public:
  explicit Line(const Style& style) : style_(style) {}

  Line& Add(std::string_view text, Color color = Color::kPlain) {
    const std::string fitting = Fit(text);
    const bool colored = style_.color && color != Color::kPlain && !fitting.empty();
    StrAppend(&line_, colored ? Code(color) : "", fitting, colored ? "\x1b[0m" : "");
    return *this;
  }
  // On a background of the 256-color palette, in black or white.
  Line& AddOn(int background, bool bright, std::string_view text) {
    const std::string fitting = Fit(text);
    if (!fitting.empty())
      StrAppend(&line_, "\x1b[38;5;", bright ? 16 : 255, ";48;5;", background, "m", fitting, "\x1b[0m");
    return *this;
  }
  Line& PadTo(int column) { return Add(std::string(static_cast<size_t>(std::max(0, column - width_)), ' ')); }
  int left() const { return style_.columns - width_; }
  std::string Take() { return std::move(line_); }

 private:
  std::string Fit(std::string_view text) {
    size_t end = 0;
    while (end < text.size() && width_ < style_.columns) {
      ++width_;
      do {
        ++end;
      } while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80);
    }
    return std::string(text.substr(0, end));
  }

  const Style& style_;
  std::string line_;
  int width_ = 0;
};

// Eight steps from nothing to `top`.
std::string_view Step(double value, double top, bool utf8) {
  static constexpr std::array<std::string_view, 9> kBlocks = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  static constexpr std::array<std::string_view, 9> kAscii = {" ", ".", ".", ":", "-", "=", "+", "*", "#"};
  const double part = top > 0 ? std::clamp(value / top, 0.0, 1.0) : 0;
  return (utf8 ? kBlocks : kAscii)[static_cast<size_t>(std::ceil(part * 8))];
}

std::string_view Shade(double value, double top, bool utf8) {
  static constexpr std::array<std::string_view, 5> kShades = {"·", "░", "▒", "▓", "█"};
  static constexpr std::array<std::string_view, 5> kAscii = {".", "-", "+", "*", "#"};
  const double part = top > 0 ? std::clamp(value / top, 0.0, 1.0) : 0;
  return (utf8 ? kShades : kAscii)[static_cast<size_t>(std::ceil(part * 4))];
}

// From the palette's dark to its light blues and greens.
constexpr std::array<int, 8> kHeat = {235, 23, 24, 30, 31, 37, 44, 51};
constexpr size_t kBright = 5;  // from here on black reads better than white

size_t HeatStep(double value, double top) {
  const double part = top > 0 ? std::clamp(value / top, 0.0, 1.0) : 0;
  return static_cast<size_t>(std::ceil(part * (kHeat.size() - 1)));
}

std::string Repeat(std::string_view glyph, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += glyph;
  return text;
}

Color ColorOf(const std::string& state) {
  if (state == "ready" || state == "ok") return Color::kGood;
  if (state == "lost" || state == "down") return Color::kBad;
  return state == "left" ? Color::kDim : Color::kWarn;
}

std::string LoadOf(const std::string& role, const Json& load) {
  const auto number = [&load](const char* key) { return Number(load.value(key, 0.0)); };
  if (role == "gateway")
    return StrCat(number("sequences"), " sequences  ", number("connections"), " connections");
  if (role == "attention") {
    const double pages = std::max(1.0, load.value("cache_pages_total", 0.0));
    return StrCat(number("running"), " running  ", number("waiting"), " waiting  ", number("tokens_per_s"),
                  " tokens/s  cache ",
                  absl::StrFormat("%.1f%%", 100 * load.value("cache_pages_used", 0.0) / pages));
  }
  if (role == "router") return StrCat(number("rows_per_s"), " rows/s");
  return StrCat(number("rows_per_s"), " rows/s  ", number("queued_rows"), " queued  ", number("units"),
                " units");
}

class Frame {
 public:
  Frame(const Json& view, const std::string& problem, const Style& style)
      : view_(view), problem_(problem), style_(style) {}

  std::vector<std::string> Make() {
    Head();
    Traffic();
    Pools();
    HeatMap();
    Events();
    if (style_.rows > 0 && std::ssize(lines_) > style_.rows) lines_.resize(static_cast<size_t>(style_.rows));
    return std::move(lines_);
  }

 private:
  Line NewLine() const { return Line(style_); }
  void Put(Line line) { lines_.push_back(line.Take()); }
  int RowsLeft() const { return style_.rows == 0 ? 1 << 20 : style_.rows - static_cast<int>(lines_.size()); }

  void Head() {
    const bool ready = view_.value("ready", false);
    Line line = NewLine();
    line.Add("Minke ", Color::kBold).Add(view_["model"].value("name", "?")).Add("  ");
    line.Add(ready ? "serving" : "not ready", ready ? Color::kGood : Color::kBad);
    line.Add(StrCat("  epoch ", view_["epoch"].value("term", int64_t{0}), ".",
                    view_["epoch"].value("counter", int64_t{0}), "  leader ", ShortId(view_["leader"])),
             Color::kDim);
    line.PadTo(style_.columns - 8).Add(Clock(view_.value("time_ms", int64_t{0})), Color::kDim);
    Put(std::move(line));
    if (!problem_.empty()) Put(std::move(NewLine().Add(problem_, Color::kBad)));
    if (!ready)
      Put(std::move(NewLine().Add(TextOr(view_["not_ready_reason"], "no reason given"), Color::kWarn)));
    if (!view_.value("registry_connected", true))
      Put(std::move(
          NewLine().Add("the registry does not answer: members are the last ones known", Color::kWarn)));
  }

  void Traffic() {
    const Json& traffic = view_["traffic"];
    const auto latency = [&traffic](const char* key) {
      return StrCat(Time(traffic[key]["p50"]), " (95%: ", Time(traffic[key]["p95"]), ")");
    };
    Line line = NewLine();
    line.Add(StrCat(Number(traffic.value("tokens_per_s", 0.0)), " tokens/s"), Color::kBold);
    line.Add(StrCat("  first ", latency("first_token_ms"), "  each ", latency("token_ms"), "  ",
                    Number(traffic.value("sequences", 0.0)), " open"));
    if (const double failed = traffic.value("failed", 0.0); failed > 0)
      line.Add(StrCat("  ", Number(failed), " failed"), Color::kBad);
    Put(std::move(line));
    const auto series = traffic["series"]["tokens"].get<std::vector<double>>();
    const double top = series.empty() ? 0 : *std::max_element(series.begin(), series.end());
    Line chart = NewLine();
    const size_t shown = std::min(series.size(), static_cast<size_t>(std::max(0, style_.columns - 20)));
    for (size_t i = series.size() - shown; i < series.size(); ++i)
      chart.Add(Step(series[i], top, style_.utf8));
    Put(std::move(chart.Add(StrCat("  peak ", Number(top), "/s"), Color::kDim)));
  }

  void Pools() {
    // On a screen, half of what is left belongs to the heat map and the events.
    int64_t members = 0;
    for (const Json& pool : view_["pools"]) members += std::max<int64_t>(1, std::ssize(pool["members"]));
    const int64_t room = std::max<int64_t>(4, RowsLeft() / 2);
    const bool fits = members + 4 <= room;
    for (const Json& pool : view_["pools"]) {
      const auto count = static_cast<int64_t>(pool["members"].size());
      const int64_t shown =
          fits ? count
               : std::min(count, std::max<int64_t>(1, count * (room - 8) / std::max<int64_t>(1, members)));
      Pool(pool, shown);
    }
  }

  // Those in trouble first, where not all can be shown.
  void Pool(const Json& pool, int64_t shown) {
    const std::string name = pool.value("name", "?"), health = pool.value("health", "?"),
                      role = pool.value("role", "?");
    Line head = NewLine();
    head.Add(name, Color::kBold)
        .PadTo(11)
        .Add(StrCat(Number(pool.value("ready", 0.0)), " ready"), ColorOf(health));
    if (health != "ok") head.Add(StrCat(", ", health), ColorOf(health));
    std::vector<const Json*> members;
    for (const Json& member : pool["members"]) members.push_back(&member);
    if (shown < std::ssize(members)) {
      std::stable_partition(members.begin(), members.end(),
                            [](const Json* member) { return (*member)["state"] != "ready"; });
      head.Add(StrCat("  (", shown, " of ", members.size(), " shown)"), Color::kDim);
      members.resize(static_cast<size_t>(shown));
    }
    Put(std::move(head));
    for (const Json* member : members) Member(*member, role);
  }

  void Member(const Json& member, const std::string& role) {
    const std::string state = member.value("state", "?");
    Line line = NewLine();
    line.Add("  ").Add(ShortId(member["id"])).PadTo(11).Add(state, ColorOf(state));
    if (role == "router" && member["id"] == view_["leader"]) line.Add(" leads", Color::kDim);
    line.PadTo(26).Add(TextOr(member["address"], "-"), Color::kDim).PadTo(49);
    if (state == "lost" || state == "left") {
      const int64_t seconds =
          (view_.value("time_ms", int64_t{0}) - member.value("since_ms", int64_t{0})) / 1000;
      line.Add(StrCat(std::max<int64_t>(0, seconds), " s ago"), ColorOf(state));
    } else if (member["detail"].is_string() && state == "loading") {
      line.Add(member["detail"].get<std::string>(), Color::kWarn);
    } else {
      line.Add(LoadOf(role, member["load"]));
    }
    Put(std::move(line));
  }

  // A row per layer, or per some layers where the screen is too small for all.
  void HeatMap() {
    const Json& heat = view_["heat"];
    const auto layers = heat["layers"].get<std::vector<int64_t>>();
    const auto rows = heat["rows_per_s"].get<std::vector<std::vector<double>>>();
    const auto servers = static_cast<int>(heat["servers"].size());
    const int room = RowsLeft() - 2 - kEventsMin;
    if (servers == 0 || layers.empty() || rows.size() != layers.size() || room < 1) return;
    double top = 0;
    for (const auto& row : rows) top = std::max(top, *std::max_element(row.begin(), row.end()));
    Put(std::move(NewLine()
                      .Add("experts", Color::kBold)
                      .PadTo(11)
                      .Add(StrCat("rows/s, layer x server, at most ", Number(top)), Color::kDim)));
    constexpr int kMargin = 8;
    const int width = std::clamp((style_.columns - kMargin) / servers, 1, 9);
    if (width >= 9) {
      Line names = NewLine();
      names.PadTo(kMargin);
      for (const Json& server : heat["servers"]) names.Add(ShortId(server), Color::kDim).Add(" ");
      Put(std::move(names));
    }
    const auto per_line = static_cast<size_t>((std::ssize(layers) + room - 1) / room);
    for (size_t begin = 0; begin < layers.size(); begin += per_line) {
      const size_t end = std::min(layers.size(), begin + per_line);
      Line line = NewLine();
      line.Add(end - begin == 1 ? absl::StrFormat("%5d", layers[begin])
                                : absl::StrFormat("%5s", StrCat(layers[begin], "-", layers[end - 1])),
               Color::kDim)
          .PadTo(kMargin);
      for (int server = 0; server < servers; ++server) {
        double value = 0;  // the mean of the line's layers
        for (size_t layer = begin; layer < end; ++layer)
          value += rows[layer][static_cast<size_t>(server)] / static_cast<double>(end - begin);
        Cell(line, value, top, width);
      }
      Put(std::move(line));
    }
  }

  void Cell(Line& line, double value, double top, int width) const {
    const int gap = width >= 3 ? 1 : 0;
    // Numbers where they fit; there the color only helps.
    const std::string number = width >= 6 ? absl::StrFormat("%*s", width - gap, Number(value)) : "";
    if (style_.color) {
      const size_t step = HeatStep(value, top);
      line.AddOn(kHeat[step], step >= kBright,
                 number.empty() ? std::string(static_cast<size_t>(width - gap), ' ') : number);
    } else {
      line.Add(number.empty() ? Repeat(Shade(value, top, style_.utf8), width - gap) : number);
    }
    if (gap > 0) line.Add(" ");
  }

  void Events() {
    const Json& events = view_["events"];
    const int shown = std::min({static_cast<int>(events.size()), kEventsMax, RowsLeft() - 1});
    if (shown < 1) return;
    Put(std::move(NewLine().Add("events", Color::kBold)));
    for (int i = 0; i < shown; ++i) {
      const Json& event = events[events.size() - 1 - static_cast<size_t>(i)];
      const std::string kind = event.value("kind", "");
      const Color color = kind == "lost"                                                  ? Color::kBad
                          : kind == "failover" || kind == "draining" || kind == "unready" ? Color::kWarn
                                                                                          : Color::kPlain;
      Put(std::move(NewLine()
                        .Add(StrCat("  ", Clock(event.value("time_ms", int64_t{0})), "  "), Color::kDim)
                        .Add(event.value("text", ""), color)));
    }
  }

  const Json& view_;
  const std::string& problem_;
  const Style& style_;
  std::vector<std::string> lines_;
};

}  // namespace

absl::StatusOr<std::vector<std::string>> Render(const Json& view, const std::string& problem,
                                                const Style& style) {
  const bool has_schema = view.is_object() && view.contains("schema") && view["schema"].is_number_integer();
  if (!has_schema)
    return absl::InvalidArgumentError("/cluster: expected a cluster's view, found something else");
  if (view["schema"] != kSchema) {
    return absl::InvalidArgumentError(StrCat("/cluster: expected schema ", kSchema, ", found ",
                                             view["schema"].dump(), ": the gateway is of another version"));
  }
  try {
    return Frame(view, problem, style).Make();
  } catch (const Json::exception& error) {
    return absl::InvalidArgumentError(StrCat("/cluster: not as expected: ", error.what()));
  }
}

}  // namespace minke::cli::top
