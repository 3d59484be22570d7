// UCX's own benchmark, ucx_perftest, as the measure of what a transport over UCX could do.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cli/bench/subprocess.h"

namespace minke::cli::bench {

// Runs it as server and client on this machine, both with the same settings. Thread-compatible.
class UcxPerftest {
 public:
  // `host`: an address of this machine; `settings`: UCX_* variables. NOT_FOUND: it is not on PATH.
  static absl::StatusOr<UcxPerftest> Create(std::string host, Variables settings);

  struct RoundTrips {
    double p50_us = 0, p99_us = 0;
  };
  // Active messages there and back, one at a time. Takes about `time`, of which `round_trip` (a guess) fills
  // how many.
  absl::StatusOr<RoundTrips> MeasureRoundTrips(uint32_t bytes, absl::Duration time,
                                               absl::Duration round_trip);
  // Bytes a second one way, many messages under way; `bytes_per_s` is the guess.
  absl::StatusOr<double> MeasureBandwidth(uint32_t bytes, absl::Duration time, double bytes_per_s);

 private:
  UcxPerftest(std::string program, std::string host, Variables settings)
      : program_(std::move(program)), host_(std::move(host)), settings_(std::move(settings)) {}

  // Columns of the result.
  struct Line {
    double percentile_us = 0;  // half a round trip
    double mib_per_s = 0;
  };
  static absl::StatusOr<Line> ParseLine(const std::string& text);
  absl::StatusOr<Line> Run(const std::string& test, uint32_t bytes, int64_t iterations, int percentile);

  std::string program_, host_;
  Variables settings_;
};

}  // namespace minke::cli::bench
