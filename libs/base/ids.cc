#include "libs/base/ids.h"

#include <random>

namespace minke {

NodeId RandomNodeId() {
  std::random_device device;
  uint64_t value = 0;
  while (value == 0) value = (uint64_t{device()} << 32) | device();
  return NodeId{value};
}

}  // namespace minke
