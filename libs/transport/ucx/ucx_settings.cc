#include "libs/transport/ucx/ucx_settings.h"

namespace minke::transport::internal {

UcxSettings SettingsFor(UcxSelection selection, const std::string& interface, bool loopback, bool rdma_present) {
  UcxSettings settings = {
      {"KEEPALIVE_INTERVAL", "500ms"},
      // A restarted process gets its fixed port back although connections of its former life are in TIME_WAIT.
      {"TCP_CM_REUSEADDR", "y"},
      // Without it error mode PEER silently drops shared memory. 60k: with 64k and more UCX 1.13 hangs or asserts.
      {"POSIX_ERROR_HANDLING", "y"},
      {"POSIX_SEG_SIZE", "60k"},
  };
  const bool rdma = selection == UcxSelection::kRdma || (selection == UcxSelection::kAuto && rdma_present);
  if (rdma) return settings;  // UCX_TLS, UCX_NET_DEVICES and the rendezvous threshold are for UCX to choose

  // Exactly one device: otherwise UCX stripes over all of them.
  settings.emplace_back("NET_DEVICES", interface);
  settings.emplace_back("TCP_TX_SEG_SIZE", "256k");
  settings.emplace_back("TCP_RX_SEG_SIZE", "256k");
  const bool shm = selection == UcxSelection::kShm || (selection == UcxSelection::kAuto && loopback);
  // Connections by socket address need tcp in any case. Above every payload: with PEER, rendezvous would go over tcp.
  settings.emplace_back("TLS", shm ? "posix,cma,tcp,self" : "tcp,self");
  settings.emplace_back("RNDV_THRESH", shm ? "1m" : "512k");
  return settings;
}

}  // namespace minke::transport::internal
