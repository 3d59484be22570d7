// Lengths of prompts and answers, in tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "cli/bench/random.h"

namespace minke::cli::bench {

inline constexpr int64_t kLengthTokensMax = 1 << 24;

// Immutable, thread-safe.
class LengthDistribution {
 public:
  // One of
  //   128                              always the same
  //   64:256                           each length of the range as likely as any other
  //   normal:MEAN:STDDEV[:MIN:MAX]     rounded; what falls outside the range is drawn again
  //   lognormal:MEDIAN:SIGMA[:MIN:MAX] exp of a normal with mean ln MEDIAN and standard deviation SIGMA; the
  //   same zipf:EXPONENT:MIN:MAX            the k-th length from MIN on has a weight of k^-EXPONENT file:PATH
  //   one length a line, each line as likely as any other
  // INVALID_ARGUMENT says what was expected; NOT_FOUND for a file that cannot be read.
  static absl::StatusOr<LengthDistribution> Parse(const std::string& spec);

  // In [1, kLengthTokensMax].
  int64_t Sample(Random& random) const { return sample_(random); }

 private:
  using Sampler = std::function<int64_t(Random&)>;
  explicit LengthDistribution(Sampler sample) : sample_(std::move(sample)) {}
  Sampler sample_;
};

}  // namespace minke::cli::bench
