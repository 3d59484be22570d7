// The processes of `minke up` as Prometheus' file discovery wants them: a JSON file that is replaced as a
// whole whenever members come or go.
#pragma once

#include <span>
#include <string>

#include "absl/status/status.h"

namespace minke::cli {

struct ScrapeTarget {
  std::string address;  // HOST:PORT that serves /metrics
  std::string job;      // "minke-expert"
  std::string member;   // "expert 1"
  bool tls = false;     // to be asked by https
};

// Where it is without --targets-file.
std::string DefaultTargetsFile(int http_port, unsigned user);

std::string TargetsJson(const std::string& cluster, std::span<const ScrapeTarget> targets);

// Readers see the old content or the new one. UNAVAILABLE says what stands against it.
absl::Status ReplaceFile(const std::string& path, const std::string& content);

}  // namespace minke::cli
