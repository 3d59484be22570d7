// Waiting for a channel that the synchronous API uses. Calls that fail fast leave nobody waiting, and then
// gRPC looks at its sockets every 5 s only: an endpoint that came back would be noticed that late.
#pragma once

#include <grpcpp/grpcpp.h>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

namespace minke::rpc {

// UNAVAILABLE once an attempt has failed and the next one, a moment later, too; DEADLINE_EXCEEDED if there is
// no answer either way; CANCELLED soon after `cancelled()` holds.
absl::Status Connect(grpc::Channel& channel, absl::Duration timeout, absl::FunctionRef<bool()> cancelled);

}  // namespace minke::rpc
