// What `minke bench transport` measured, as a table and as JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/bench/frame_bench.h"
#include "cli/bench/ucx_perftest.h"

namespace minke::cli::bench {

struct TransportRow {
  std::string name;   // "ucx" | "inproc"
  std::string lanes;  // as UCX names them: "posix", "tcp", ...
  uint32_t bytes = 0;
  FrameClient::RoundTrips round_trip;
  double dispatch_bytes_per_s = 0, partial_bytes_per_s = 0;
  struct Raw {
    UcxPerftest::RoundTrips round_trip;
    double bytes_per_s = 0;
  };
  std::optional<Raw> raw;
  std::string raw_error;  // why there is none; empty: there should be none
};

struct TransportReport {
  std::string version, transport, interface, poll;
  double min_time_s = 0;
  std::string raw_missing;  // why there is no ucx_perftest beside it; empty: there is
  std::vector<TransportRow> rows;
};

std::string TransportTableHead(const TransportReport& report);
std::string FormatTransportRow(const TransportRow& row);  // one line
std::string FormatTransportJson(const TransportReport& report);

}  // namespace minke::cli::bench
