// Which UCX settings a selection means. Numbers were measured on UCX 1.13.1.
#pragma once

#include <string>
#include <vector>

#include "libs/transport/ucx/ucx.h"

namespace minke::transport::internal {

struct UcxSetting {
  std::string name;  // as documented, without "UCX_": what a user's own variable is called
  std::string value;
  // As ucp_config_modify of UCX 1.13 takes it, if that is another name: settings of transports have no prefix
  // of the transport there, but that of the table they inherit.
  std::string name_1_13;
};

// Pure. `interface` is its name. `cuda`: rows lie in GPU memory, and this UCX has the transports for it (it
// warns of those it does not have).
std::vector<UcxSetting> SettingsFor(UcxSelection selection, const std::string& interface, bool loopback,
                                    bool rdma_present, bool cuda);

}  // namespace minke::transport::internal
