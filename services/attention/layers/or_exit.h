// What a GPU's errors come to.
#pragma once

#include <cstdlib>
#include <utility>

#include "absl/status/statusor.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"

namespace minke::attention {

// A GPU that has failed computes nothing more in this process. Its streams go on elsewhere, as when the
// machine dies.
inline void OrExit(const absl::Status& status) {
  if (status.ok()) return;
  log::Error("attention", StrCat("the GPU failed: ", status.message()));
  std::_Exit(1);
}

template <class T>
T OrExit(absl::StatusOr<T> result) {
  OrExit(result.status());
  return *std::move(result);
}

}  // namespace minke::attention
