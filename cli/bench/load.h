// Puts load on a server: closed loop (so many requests at once) or open loop (so many a second, whatever the
// server manages), and says how each request went.
#pragma once

#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>

#include "cli/bench/arrival.h"
#include "cli/bench/request_source.h"
#include "cli/bench/statistics.h"
#include "cli/bench/stream_client.h"

namespace minke::cli::bench {

struct LoadPlan {
  std::optional<int64_t> requests_max;          // at least one of the two
  std::optional<Clock::duration> duration_max;  // no request begins later; those under way are finished
  // Closed loop: as many workers, each with one request after the other. Open loop: requests under way at
  // once; one that is due has to wait when they are reached, and its latency counts from when it was due.
  int concurrency = 1;
  std::optional<double> rate_per_s;  // open loop
  Arrival arrival = Arrival::kPoisson;
  Clock::duration timeout = std::chrono::seconds(600);  // of one request, from when it is sent
  uint64_t seed = 0;
};

struct LoadState {
  Clock::duration elapsed{};
  int64_t started = 0, completed = 0, failed = 0, interrupted = 0;
  int64_t output_events = 0;  // of all requests so far
  int under_way = 0, under_way_max = 0;
  int64_t not_sent = 0;  // open loop: were due within duration_max, but no place became free in time
};

// How often `on_progress` is called.
inline constexpr std::chrono::seconds kProgressInterval{1};

// Runs `plan` in `context` until it is done or a SIGINT or SIGTERM arrives: then no request begins any more
// and those under way end as kInterrupted; `interrupted` is set. SIGINT and SIGTERM must not be blocked.
// elapsed goes from the begin to the last request's end. `make_request` is asked for 0, 1, 2, ...
struct LoadResult {
  LoadState state;
  bool interrupted = false;
};
LoadResult RunLoad(boost::asio::io_context& context, StreamClient& client, const LoadPlan& plan,
                   const std::function<Request(int64_t)>& make_request,
                   const std::function<void(const RequestRecord&)>& on_record,
                   const std::function<void(const LoadState&)>& on_progress);

}  // namespace minke::cli::bench
