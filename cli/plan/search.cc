#include "cli/plan/search.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "absl/strings/str_format.h"
#include "libs/base/status.h"

namespace minke::cli {
namespace {

constexpr size_t kOthersMax = 5;

double PriceOf(const CapacityModel& model, const Pools& pools, int routers) {
  const Hardware& h = model.hardware();
  return pools.attention * h.attention_price + pools.experts * h.expert_price + routers * h.router_price;
}

class Searcher {
 public:
  Searcher(const CapacityModel& model, const SearchOptions& options) : model_(model), options_(options) {}

  absl::StatusOr<SearchResult> Run() {
    MK_RETURN_IF_ERROR(CheckMemory());
    const auto [m_begin, m_end] = Range(options_.microbatches, 1, options_.microbatches_max);
    const auto [a_begin, a_end] = Range(options_.attention, 1, options_.nodes_max);
    const auto [e_begin, e_end] = Range(options_.experts, servers_min_, options_.nodes_max);
    for (int microbatches = m_begin; microbatches < m_end; ++microbatches) {
      for (int attention = a_begin; attention < a_end; ++attention) {
        for (int experts = e_begin; experts < e_end; ++experts) {
          if (std::optional<Pools> full = Fullest({attention, experts, microbatches, 1}))
            plans_.push_back(Evaluate(model_, *full));
        }
      }
    }
    if (plans_.empty()) return TooSlow();
    SearchResult result;
    if (options_.target_tokens_per_s > 0) {
      MK_ASSIGN_OR_RETURN(result.best, ForTarget());
    } else {
      result.best = BestUnit();
    }
    result.others = Others(result.best);
    return result;
  }

 private:
  // Half-open: what is given, else [least, most].
  static std::pair<int, int> Range(int given, int least, int most) {
    return given > 0 ? std::pair(given, given + 1) : std::pair(least, most + 1);
  }

  bool Fits(const Pools& pools) const {
    const StepTime step = model_.Steady(pools);
    const Workload& w = model_.workload();
    if (step.step_s > w.tpot_slo_s) return false;
    if (static_cast<double>(pools.sequences) + step.prompt_rows > static_cast<double>(w.step_tokens))
      return false;
    if (w.prompt_tokens <= 0 || w.ttft_slo_s == kNone) return true;
    return model_.TimeToFirstToken(pools, step) <= w.ttft_slo_s;
  }

  // With the most sequences that keep what is wanted: all times grow with them.
  std::optional<Pools> Fullest(Pools pools) const {
    if (options_.sequences > 0) {
      pools.sequences = options_.sequences;
      return pools.microbatches <= pools.sequences && Fits(pools) ? std::optional(pools) : std::nullopt;
    }
    int64_t low = pools.microbatches, high = sequences_max_ + 1;
    pools.sequences = low;
    if (low >= high || !Fits(pools)) return std::nullopt;
    while (high - low > 1) {
      pools.sequences = low + (high - low) / 2;
      (Fits(pools) ? low : high) = pools.sequences;
    }
    pools.sequences = low;
    return pools;
  }

  absl::Status CheckMemory() {
    sequences_max_ = model_.SequencesMax();
    const int64_t sequences = std::max<int64_t>(1, options_.sequences);
    const Memory node = model_.AttentionMemory({.sequences = sequences});
    if (sequences_max_ < sequences) {
      return absl::FailedPreconditionError(
          absl::StrFormat("an attention node is too small: expected %.1f GB for weights, workspace and "
                          "sequences (%d) of %.0f "
                          "tokens, found %.1f GB usable",
                          node.used() / 1e9, sequences, model_.workload().tokens_max, node.total / 1e9));
    }
    if (options_.experts > 0 && model_.ExpertMemory(options_.experts).share() > 1) {
      const Memory server = model_.ExpertMemory(options_.experts);
      return absl::FailedPreconditionError(absl::StrFormat(
          "the experts do not fit %d expert servers: expected %.1f GB each, found %.1f GB usable",
          options_.experts, server.used() / 1e9, server.total / 1e9));
    }
    servers_min_ = model_.ExpertServersMin(options_.nodes_max);
    if (options_.experts == 0 && servers_min_ > options_.nodes_max) {
      const Memory last = model_.ExpertMemory(options_.nodes_max);
      return absl::FailedPreconditionError(
          absl::StrFormat("the experts do not fit: %d expert servers (--nodes-max) of %.1f GB usable would "
                          "each hold %d units "
                          "of %.1f MB, %.1f GB",
                          options_.nodes_max, last.total / 1e9, model_.SlotsOf(options_.nodes_max),
                          model_.cost().unit_bytes / 1e6, last.used() / 1e9));
    }
    return absl::OkStatus();
  }

  // Names the least time per token, its parts, and what of them alone is too long.
  absl::Status TooSlow() const {
    const Workload& w = model_.workload();
    std::optional<StepTime> least;
    Pools fastest;
    double first_s = kNone;
    const auto [begin, end] = Range(options_.experts, servers_min_, options_.nodes_max);
    const int64_t sequences = std::max<int64_t>(1, options_.sequences);
    for (int experts = begin; experts < end; ++experts) {
      const Pools pools{std::max(1, options_.attention), experts, std::max(1, options_.microbatches),
                        sequences};
      const StepTime step = model_.Steady(pools);
      first_s = std::min(first_s, model_.TimeToFirstToken(pools, step));
      if (!least || step.step_s < least->step_s) least = step, fastest = pools;
    }
    if (least->step_s <= w.tpot_slo_s && w.ttft_slo_s == kNone) {
      return absl::FailedPreconditionError(
          absl::StrFormat("no plan: %d microbatches need as many sequences, and a step holds at most %d rows "
                          "of sequences and prompts (--step-tokens)",
                          std::max(1, options_.microbatches), w.step_tokens));
    }
    const double layers = model_.cost().moe_layers;
    const LayerTimes& l = least->layer;
    struct Part {
      const char* name;
      double seconds;
    };
    const Part parts[] = {{"attention and head", layers * l.attention_s + least->dense_s + least->head_s},
                          {"crossings to the host", layers * l.crossing_s},
                          {"gate", layers * l.router_s},
                          {"network", layers * l.network_s},
                          {"experts", layers * l.experts_s}};
    if (least->step_s <= w.tpot_slo_s) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "no plan keeps --ttft-ms %g: the least time to the first token of %.0f prompt tokens is %.0f ms",
          w.ttft_slo_s * 1e3, w.prompt_tokens, first_s * 1e3));
    }
    std::string text = absl::StrFormat(
        "no plan keeps --tpot-ms %g: the least is %.1f ms, with %d x %d sequences and %d expert servers (",
        w.tpot_slo_s * 1e3, least->step_s * 1e3, fastest.attention, sequences, fastest.experts);
    std::string alone;
    for (const Part& part : parts) {
      absl::StrAppendFormat(&text, "%s%s %.1f", &part == &parts[0] ? "" : ", ", part.name,
                            part.seconds * 1e3);
      if (part.seconds > w.tpot_slo_s) StrAppend(&alone, alone.empty() ? "" : " and ", part.name);
    }
    StrAppend(&text, alone.empty() ? "); no part alone is too long" : StrCat("); alone too long: ", alone));
    return absl::FailedPreconditionError(text);
  }

  Plan BestUnit() const {
    double least = kNone;
    for (const Plan& plan : plans_) least = std::min(least, plan.price_per_million);
    const Plan* best = nullptr;
    for (const Plan& plan : plans_) {
      if (plan.price_per_million > options_.price_slack * least) continue;
      if (best == nullptr || plan.price_per_hour < best->price_per_hour ||
          (plan.price_per_hour == best->price_per_hour && plan.tokens_per_s > best->tokens_per_s))
        best = &plan;
    }
    return *best;
  }

  absl::StatusOr<Plan> ForTarget() const {
    double most = 0;
    for (const Plan& plan : plans_) most = std::max(most, plan.tokens_per_s);
    const double needed = std::ceil(options_.target_tokens_per_s / most);
    if (needed > options_.clusters_max) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "the target of %.0f tokens/s needs more than %d clusters: one of at most %d + %d nodes "
          "(--nodes-max) reaches %.0f",
          options_.target_tokens_per_s, options_.clusters_max, options_.nodes_max, options_.nodes_max, most));
    }
    const double target = options_.target_tokens_per_s / needed;
    const Plan* best = nullptr;
    for (const Plan& plan : plans_) {
      if (plan.tokens_per_s < target) continue;
      if (best == nullptr || plan.price_per_hour < best->price_per_hour) best = &plan;
    }
    Plan plan = *best;
    plan.clusters = static_cast<int>(needed);
    plan.spare_attention = plan.spare_experts = 1;
    plan.target_tokens_per_s = target;
    // The load that all machines have then.
    Pools all = plan.pools;
    all.attention += 1, all.experts += 1;
    int64_t low = all.microbatches - 1, high = plan.pools.sequences;
    while (high - low > 1) {
      all.sequences = low + (high - low) / 2;
      (Evaluate(model_, all).tokens_per_s < target ? low : high) = all.sequences;
    }
    all.sequences = high;
    plan.target_step_s = model_.Steady(all).step_s;
    plan.target_sequences = static_cast<double>(high);
    return plan;
  }

  // Of those that nothing beats in both price an hour and throughput, some beside the best.
  std::vector<Plan> Others(const Plan& best) const {
    std::vector<const Plan*> front;
    for (const Plan& plan : plans_) front.push_back(&plan);
    std::sort(front.begin(), front.end(), [](const Plan* a, const Plan* b) {
      return a->price_per_hour != b->price_per_hour ? a->price_per_hour < b->price_per_hour
                                                    : a->tokens_per_s > b->tokens_per_s;
    });
    std::vector<Plan> kept;
    for (const Plan* plan : front) {
      if (kept.empty() || plan->tokens_per_s > kept.back().tokens_per_s) kept.push_back(*plan);
    }
    // Around the best in even steps of price: half, 3/4, 4/3, twice, four times.
    std::vector<Plan> others;
    for (const double factor : {0.25, 0.5, 0.75, 1.5, 2.0}) {
      const auto at = std::min_element(kept.begin(), kept.end(), [&](const Plan& a, const Plan& b) {
        const auto away = [&](const Plan& p) {
          return std::abs(std::log(p.price_per_hour / (best.price_per_hour * factor)));
        };
        return away(a) < away(b);
      });
      const auto same = [&](const Plan& other) {
        return at->pools.attention == other.pools.attention && at->pools.experts == other.pools.experts &&
               at->pools.microbatches == other.pools.microbatches;
      };
      if (same(best) || std::any_of(others.begin(), others.end(), same)) continue;
      if (others.size() < kOthersMax) others.push_back(*at);
    }
    return others;
  }

  const CapacityModel& model_;
  const SearchOptions options_;
  int64_t sequences_max_ = 0;
  int servers_min_ = 1;
  std::vector<Plan> plans_;
};

}  // namespace

Plan Evaluate(const CapacityModel& model, const Pools& pools) {
  Plan plan;
  plan.pools = pools;
  plan.step = model.Steady(pools);
  plan.first_token_s = model.TimeToFirstToken(pools, plan.step);
  plan.routers = model.RoutersFor(pools, plan.step);
  plan.tokens_per_s = pools.attention * static_cast<double>(pools.sequences) / plan.step.step_s;
  plan.price_per_hour = PriceOf(model, pools, plan.routers);
  plan.price_per_million = plan.price_per_hour / 3600 / plan.tokens_per_s * 1e6;
  return plan;
}

absl::StatusOr<SearchResult> Search(const CapacityModel& model, const SearchOptions& options) {
  return Searcher(model, options).Run();
}

}  // namespace minke::cli
