// The weights of one (layer, group) unit, wherever they lie. Loaded once and then immutable; the engine and
// the loader share them, so that one can be dropped while a launch still reads it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include "libs/base/ids.h"

namespace minke::experts {

// What is inside is its backend's business.
class UnitWeights {
 public:
  virtual ~UnitWeights() = default;
  virtual int64_t bytes() const = 0;  // packed, in the device's memory
};

using Units = std::map<UnitId, std::shared_ptr<const UnitWeights>>;

}  // namespace minke::experts
