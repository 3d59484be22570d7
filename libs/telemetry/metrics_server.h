// GET /metrics on an address of its own, for processes that serve no HTTP otherwise.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "libs/telemetry/page.h"
#include "libs/tls/identity.h"

namespace minke::telemetry {

// Adds what a process has to show. Called on the server's thread, for every scrape; must be thread-safe.
using Collector = std::function<void(Page&)>;

// The collector is not called after destruction.
class MetricsServer {
 public:
  // `listen`: host:port, port 0 for a free one. `identity`: null for plain HTTP; with its CA scrapers need a
  // certificate. UNAVAILABLE if the address cannot be had.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(
      const std::string& listen, Collector collector, std::shared_ptr<tls::Identity> identity = nullptr);
  ~MetricsServer();
  int port() const;
  const std::string& address() const { return address_; }  // host:port, with the port that was found

 private:
  struct Impl;
  MetricsServer(std::unique_ptr<Impl> impl, const std::string& host);
  std::string address_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace minke::telemetry
