// The weights of one (layer, group) unit, wherever they lie. Loaded once and then immutable; the engine and
// the loader share them, so that one can be dropped while a launch still reads it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "libs/base/ids.h"

namespace minke::experts {

// What is inside is its backend's business.
class UnitWeights {
 public:
  virtual ~UnitWeights() = default;
  virtual int64_t bytes() const = 0;  // packed, in the device's memory
  // Bytes [begin, begin + out.size()) of the packed form, for another server that packs alike. Engine thread.
  // REQUIRES: they are within bytes(). An error: the device is lost.
  virtual absl::Status Read(int64_t begin, std::span<std::byte> out) const = 0;
};

// A unit on its way here in packed form, piece by piece. Of one thread.
class UnitBuilder {
 public:
  virtual ~UnitBuilder() = default;
  virtual int64_t bytes() const = 0;
  // REQUIRES: the bytes are within bytes(). An error: the device is lost.
  virtual absl::Status Write(int64_t begin, std::span<const std::byte> bytes) = 0;
  // REQUIRES: every byte was written. Nothing is called afterwards.
  virtual absl::StatusOr<std::shared_ptr<const UnitWeights>> Finish() = 0;
};

using Units = std::map<UnitId, std::shared_ptr<const UnitWeights>>;

}  // namespace minke::experts
