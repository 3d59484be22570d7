// Which UCX settings a selection means. Numbers were measured on UCX 1.13.1; docs/wire_format.md names the traps.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "libs/transport/ucx/ucx.h"

namespace minke::transport::internal {

// Names without "UCX_", as ucp_config_modify takes them.
using UcxSettings = std::vector<std::pair<std::string, std::string>>;

// Pure. `interface` is its name.
UcxSettings SettingsFor(UcxSelection selection, const std::string& interface, bool loopback, bool rdma_present);

}  // namespace minke::transport::internal
