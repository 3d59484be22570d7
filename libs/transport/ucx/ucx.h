// Transport over UCX active messages: RDMA where there is a NIC, shared memory on one host, TCP otherwise.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/transport/transport.h"

namespace minke::transport {

// --transport of the programs. A UCX_* variable of the user's own always wins over what a selection sets.
enum class UcxSelection : uint8_t {
  kAuto,  // RDMA device present: UCX chooses. Otherwise shared memory on a loopback interface, tcp on any
          // other, because UCX takes shared memory also between network namespaces of one host, where its
          // wake-up is lost.
  kShm,   // shared memory where peers are on this host (and in this network namespace), tcp elsewhere
  kTcp,
  kRdma,  // as kAuto with an RDMA device; FAILED_PRECONDITION without
};
// "auto", "shm", "tcp", "rdma"; INVALID_ARGUMENT otherwise.
absl::StatusOr<UcxSelection> ParseUcxSelection(std::string_view text);

// Whether UCX has transports for CUDA, and sees a GPU. Makes no CUDA context.
bool UcxKnowsCuda();

struct UcxOptions {
  TransportOptions transport;
  std::string interface = "lo";  // name, or one of its addresses: what is listened on and sent through
  uint16_t port = 0;             // 0: a free one
  std::string advertise_host;    // in address(), if peers see another host than the interface's address
  UcxSelection selection = UcxSelection::kAuto;
};

// INVALID_ARGUMENT: no such interface. UNAVAILABLE: the port is taken, or UCX does not start.
absl::StatusOr<std::unique_ptr<Transport>> CreateUcx(Identity identity, UcxOptions options = {});

// UCX_* variables and values with which another program (ucx_perftest) makes the choices of CreateUcx;
// without those that this process's environment has already. Same errors.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> UcxEnvironment(const UcxOptions& options);

}  // namespace minke::transport
