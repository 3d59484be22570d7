// Transport between the roles of one process: frames are handed over by reference, everything else
// (handshake, lanes, credits, heartbeats) is as between processes.
#pragma once

#include <memory>

#include "libs/transport/transport.h"

namespace minke::transport {

namespace internal {
class InprocDirectory;
}

// Where the transports of one process find each other. Thread-safe. Its transports keep what they need of it,
// so it may go first.
class InprocHub {
 public:
  InprocHub();
  ~InprocHub();
  InprocHub(const InprocHub&) = delete;
  InprocHub& operator=(const InprocHub&) = delete;

 private:
  friend std::unique_ptr<Transport> CreateInproc(InprocHub& hub, Identity identity, TransportOptions options);
  const std::shared_ptr<internal::InprocDirectory> directory_;  // with the hub's transports
};

// Reached as "inproc:ID". REQUIRES: identity.node_id is not zero and not in use at the hub.
std::unique_ptr<Transport> CreateInproc(InprocHub& hub, Identity identity, TransportOptions options = {});

}  // namespace minke::transport
