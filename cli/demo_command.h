// `minke demo`: what a newcomer sees first. Starts a cluster on a small model, streams one completion, and
// serves until Ctrl-C.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace minke::cli {

struct DemoFlags {
  int port = 8000;
  std::string checkpoint;  // empty: random weights, made for the occasion
};

absl::Status RunDemo(const DemoFlags& flags);

}  // namespace minke::cli
