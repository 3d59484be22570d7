#include "libs/rpc/connect.h"

#include <algorithm>

#include "absl/time/clock.h"

namespace minke::rpc {

namespace {
constexpr absl::Duration kLook = absl::Milliseconds(50);
constexpr absl::Duration kFailing = absl::Milliseconds(200);  // longer than the pause before a second attempt
}  // namespace

absl::Status Connect(grpc::Channel& channel, absl::Duration timeout, absl::FunctionRef<bool()> cancelled) {
  const absl::Time begin = absl::Now();
  while (true) {
    const grpc_connectivity_state state = channel.GetState(/*try_to_connect=*/true);
    if (state == GRPC_CHANNEL_READY) return absl::OkStatus();
    if (cancelled()) return absl::CancelledError("cancelled");
    const absl::Time now = absl::Now();
    if (state == GRPC_CHANNEL_SHUTDOWN) return absl::UnavailableError("the channel is shut down");
    // It stays in this state while it tries again.
    if (state == GRPC_CHANNEL_TRANSIENT_FAILURE && now - begin >= std::min(kFailing, timeout)) {
      return absl::UnavailableError("cannot connect");
    }
    if (now - begin >= timeout) return absl::DeadlineExceededError("cannot connect in time");
    channel.WaitForStateChange(state, absl::ToChronoTime(now + std::min(kLook, begin + timeout - now)));
  }
}

}  // namespace minke::rpc
