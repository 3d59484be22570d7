#include "cli/bench/distribution.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <optional>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "libs/base/status.h"

namespace minke::cli::bench {
namespace {

constexpr int64_t kZipfRanksMax = 1 << 20;  // 8 MiB of weights
constexpr int64_t kFileLinesMax = 10'000'000;
// A range that a normal meets less often than once in a thousand draws gets its nearest end instead.
constexpr int kRedrawsMax = 1000;

std::optional<int64_t> Length(absl::string_view text) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < 1 || value > kLengthTokensMax) return std::nullopt;
  return value;
}

std::optional<double> Positive(absl::string_view text) {
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || !std::isfinite(value) || value <= 0) return std::nullopt;
  return value;
}

struct Range {
  int64_t min = 1, max = kLengthTokensMax;
};
// From fields[at] and fields[at + 1].
std::optional<Range> ReadRange(const std::vector<std::string>& fields, size_t at) {
  const auto min = Length(fields[at]), max = Length(fields[at + 1]);
  if (!min || !max || *min > *max) return std::nullopt;
  return Range{*min, *max};
}

// Draws until the rounded value lies in the range.
template <typename Draw>
int64_t Truncated(const Range& range, const Draw& draw) {
  double value = 0;
  for (int i = 0; i < kRedrawsMax; ++i) {
    value = std::round(draw());
    if (value >= static_cast<double>(range.min) && value <= static_cast<double>(range.max))
      return static_cast<int64_t>(value);
  }
  return value < static_cast<double>(range.min) ? range.min : range.max;
}

absl::StatusOr<std::vector<int64_t>> ReadLengths(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(StrCat(path, " cannot be read"));
  std::vector<int64_t> lengths;
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    const absl::string_view text = absl::StripAsciiWhitespace(line);
    if (text.empty()) continue;
    const auto length = Length(text);
    if (!length || number > kFileLinesMax) {
      return absl::InvalidArgumentError(StrCat(path, ":", number, ": expected a length of 1 to ",
                                               kLengthTokensMax, " tokens, in at most ", kFileLinesMax,
                                               " lines"));
    }
    lengths.push_back(*length);
  }
  if (lengths.empty())
    return absl::InvalidArgumentError(StrCat(path, ": expected one length a line, found none"));
  return lengths;
}

// weights[k] = sum of (i+1)^-exponent over i <= k, divided by the sum of all.
std::vector<double> ZipfCumulative(double exponent, int64_t ranks) {
  std::vector<double> weights(static_cast<size_t>(ranks));
  double sum = 0;
  for (size_t k = 0; k < weights.size(); ++k)
    weights[k] = sum += std::pow(static_cast<double>(k + 1), -exponent);
  for (double& weight : weights) weight /= sum;
  return weights;
}

}  // namespace

absl::StatusOr<LengthDistribution> LengthDistribution::Parse(const std::string& spec) {
  if (spec.rfind("file:", 0) == 0) {
    MK_ASSIGN_OR_RETURN(std::vector<int64_t> lengths, ReadLengths(spec.substr(5)));
    return LengthDistribution([lengths = std::move(lengths)](Random& random) {
      return lengths[static_cast<size_t>(random.Between(0, static_cast<int64_t>(lengths.size()) - 1))];
    });
  }
  const std::vector<std::string> fields = absl::StrSplit(spec, ':');
  const std::string& name = fields[0];
  const size_t count = fields.size();
  if (count == 1 && Length(name)) return LengthDistribution([n = *Length(name)](Random&) { return n; });
  if (count == 2) {
    if (const auto range = ReadRange(fields, 0)) {
      return LengthDistribution([r = *range](Random& random) { return random.Between(r.min, r.max); });
    }
  }
  if ((name == "normal" || name == "lognormal") && (count == 3 || count == 5)) {
    const auto centre = Positive(fields[1]), spread = Positive(fields[2]);
    const auto range = count == 5 ? ReadRange(fields, 3) : Range{};
    if (centre && spread && range) {
      if (name == "normal") {
        return LengthDistribution([r = *range, mean = *centre, stddev = *spread](Random& random) {
          return Truncated(r, [&] { return mean + stddev * random.Normal(); });
        });
      }
      return LengthDistribution([r = *range, median = *centre, sigma = *spread](Random& random) {
        return Truncated(r, [&] { return median * std::exp(sigma * random.Normal()); });
      });
    }
  }
  if (name == "zipf" && count == 4) {
    const auto exponent = Positive(fields[1]);
    const auto range = ReadRange(fields, 2);
    if (exponent && range && range->max - range->min < kZipfRanksMax) {
      return LengthDistribution(
          [r = *range, cumulative = ZipfCumulative(*exponent, range->max - range->min + 1)](Random& random) {
            const auto at = std::upper_bound(cumulative.begin(), cumulative.end(), random.Fraction());
            return std::min(r.min + (at - cumulative.begin()), r.max);
          });
    }
  }
  return absl::InvalidArgumentError(
      StrCat("expected N, MIN:MAX, normal:MEAN:STDDEV[:MIN:MAX], lognormal:MEDIAN:SIGMA[:MIN:MAX], "
             "zipf:EXPONENT:MIN:MAX or file:PATH with lengths of 1 to ",
             kLengthTokensMax, ", found ", spec));
}

}  // namespace minke::cli::bench
