// What gRPC has to say, as lines of our log.
#pragma once

namespace minke::rpc {

// From here on, for the whole process; later calls do nothing. At most 20 lines a second, and then how many
// more there were: anybody can cause one, by a handshake that fails.
void TakeGrpcLog();

}  // namespace minke::rpc
