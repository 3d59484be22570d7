// POST /operator/scale and /operator/drain, GET /operator/status: JSON in, a call of the operator, JSON out.
// docs/console.md has the fields. Callers are checked before.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "libs/http/exchange.h"
#include "services/gateway/cluster_view/cluster_monitor.h"
#include "services/gateway/operator_client/operator_client.h"

namespace minke::gateway {

// `monitor` is shared with the call, which may end after the request. Errors are OpenAI's error objects: 400
// for a bad body, 404 for an unknown member, 409 for what cannot be had now, 503 when `minke up` does not
// answer.
std::unique_ptr<Exchange> ScaleRoute(const std::string& body, OperatorClient& client,
                                     std::shared_ptr<ClusterMonitor> monitor, std::function<void()> wake);
std::unique_ptr<Exchange> DrainRoute(const std::string& body, OperatorClient& client,
                                     std::shared_ptr<ClusterMonitor> monitor, std::function<void()> wake);
std::unique_ptr<Exchange> StatusRoute(OperatorClient& client, std::function<void()> wake);

}  // namespace minke::gateway
