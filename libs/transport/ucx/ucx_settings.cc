#include "libs/transport/ucx/ucx_settings.h"

#include <utility>

namespace minke::transport::internal {

std::vector<UcxSetting> SettingsFor(UcxSelection selection, const std::string& interface, bool loopback,
                                    bool rdma_present, bool cuda) {
  std::vector<UcxSetting> settings = {
      {"KEEPALIVE_INTERVAL", "500ms", ""},
      // A restarted process gets its fixed port back although connections of its former life are in
      // TIME_WAIT.
      {"TCP_CM_REUSEADDR", "y", "CM_REUSEADDR"},
  };
  const bool rdma = selection == UcxSelection::kRdma || (selection == UcxSelection::kAuto && rdma_present);
  const bool shm = selection == UcxSelection::kShm || (selection == UcxSelection::kAuto && loopback);
  if (shm || rdma) {
    // Without it error mode PEER silently drops shared memory. 60k: with 64k and more UCX 1.13 hangs or
    // asserts.
    settings.push_back({"POSIX_ERROR_HANDLING", "y", "MM_ERROR_HANDLING"});
    settings.push_back({"POSIX_SEG_SIZE", "60k", "MM_SEG_SIZE"});
  }
  // With RDMA, UCX_TLS, UCX_NET_DEVICES and the rendezvous threshold are for UCX to choose.
  if (rdma) return settings;

  // Exactly one device: otherwise UCX stripes over all of them.
  settings.push_back({"NET_DEVICES", interface, ""});
  settings.push_back({"TCP_TX_SEG_SIZE", "256k", "TX_SEG_SIZE"});
  settings.push_back({"TCP_RX_SEG_SIZE", "256k", "RX_SEG_SIZE"});
  // Connections by socket address need tcp in any case. Above every payload: with PEER, rendezvous would go
  // over tcp.
  std::string transports = shm ? "posix,cma,tcp,self" : "tcp,self";
  if (cuda) transports += ",cuda_copy,cuda_ipc";
  settings.push_back({"TLS", std::move(transports), ""});
  settings.push_back({"RNDV_THRESH", shm ? "1m" : "512k", ""});
  return settings;
}

}  // namespace minke::transport::internal
