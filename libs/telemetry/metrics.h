// Values a process shows to Prometheus: read from the services' own counters at every scrape, so that
// counting costs the hot path nothing more.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace minke::telemetry {

struct Sample {
  std::string name;  // without the "minke_" prefix
  std::string help;
  enum class Type { kCounter, kGauge } type = Type::kCounter;
  std::vector<std::pair<std::string, std::string>> labels;
  double value = 0;
};

// Called on the server's threads; must be thread-safe. Samples of one name follow each other.
using Collector = std::function<std::vector<Sample>()>;

// GET /metrics on an address of its own. The collector is not called after destruction; the listening socket
// lives until the process ends.
class MetricsServer {
 public:
  // `listen`: host:port, port 0 for a free one. UNAVAILABLE if the address cannot be had.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& listen, Collector collector);
  ~MetricsServer();
  int port() const;

 private:
  struct Impl;
  explicit MetricsServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The same text for a server of one's own (the gateway's /metrics).
std::string RenderText(const std::vector<Sample>& samples);

}  // namespace minke::telemetry
