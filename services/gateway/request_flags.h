// Flags about single requests, shared by minke-gateway, `minke up` and `minke serve`.
#pragma once

namespace CLI {
class App;
}

namespace minke::gateway {

void AddRequestFlags(CLI::App& app, double& trace_ratio, double& slow_request_s);

}  // namespace minke::gateway
