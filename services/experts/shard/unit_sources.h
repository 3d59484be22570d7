// Where the next unit is loaded from. Thread-compatible; time is measured by the caller.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "absl/time/time.h"

namespace minke::experts {

enum class UnitSource : uint8_t { kCheckpoint = 0, kReplica = 1 };
enum class LoadFrom : uint8_t { kAuto, kCheckpoint, kReplica };  // a flag; the latter two where it can be had

// Takes what was faster, in packed bytes per second; tries what it does not know, and now and then what was
// slower, since disks and neighbours change.
class UnitSources {
 public:
  explicit UnitSources(LoadFrom from = LoadFrom::kAuto) : from_(from) {}

  // `replica`: some server has the unit.
  UnitSource Choose(bool replica) {
    if (!replica || from_ == LoadFrom::kCheckpoint) return UnitSource::kCheckpoint;
    if (from_ == LoadFrom::kReplica) return UnitSource::kReplica;
    for (const UnitSource source : {UnitSource::kReplica, UnitSource::kCheckpoint}) {
      if (!tried_[Index(source)]) return source;
    }
    const bool replica_faster = bytes_per_s(UnitSource::kReplica) > bytes_per_s(UnitSource::kCheckpoint);
    const bool again = ++choices_ % kTryAgain == 0;
    return replica_faster != again ? UnitSource::kReplica : UnitSource::kCheckpoint;
  }
  // `bytes` 0: it failed.
  void Record(UnitSource source, int64_t bytes, absl::Duration took) {
    const double now =
        static_cast<double>(bytes) / absl::ToDoubleSeconds(std::max(took, absl::Microseconds(1)));
    double& rate = rate_[Index(source)];
    rate = tried_[Index(source)] && bytes > 0 ? (rate + now) / 2 : now;
    tried_[Index(source)] = true;
  }
  double bytes_per_s(UnitSource source) const { return rate_[Index(source)]; }  // 0: not known, or failed

 private:
  static constexpr int64_t kTryAgain = 32;
  static size_t Index(UnitSource source) { return static_cast<size_t>(source); }

  const LoadFrom from_;
  std::array<double, 2> rate_{};
  std::array<bool, 2> tried_{};
  int64_t choices_ = 0;
};

}  // namespace minke::experts
