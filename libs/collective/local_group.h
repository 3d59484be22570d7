// A group of threads of one process.
#pragma once

#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "libs/collective/collective.h"

namespace minke {

// By rank. `deadline`: how long a rank waits for the others in one call.
std::vector<std::unique_ptr<Collective>> MakeLocalGroup(int size,
                                                        absl::Duration deadline = absl::Seconds(30));

}  // namespace minke
