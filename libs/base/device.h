// What a process computes on.
#pragma once

#include <cstdint>

namespace minke {

enum class Device : uint8_t { kCpu, kCuda };

}  // namespace minke
