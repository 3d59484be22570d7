#include "services/gateway/request_flags.h"

#include <CLI/CLI.hpp>

namespace minke::gateway {

void AddRequestFlags(CLI::App& app, double& trace_ratio, double& slow_request_s) {
  app.add_option("--trace-ratio", trace_ratio,
                 "with --otlp-endpoint: part of the requests that are traced; a client's traceparent decides "
                 "for its own")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--slow-request-s", slow_request_s,
                 "a request that takes longer is logged with its phases; 0: none")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
}

}  // namespace minke::gateway
