// Counts operator new by the names of threads (libs/base/thread_name.h). Linking this replaces the global
// operators.
#pragma once

#include <cstdint>
#include <string>

namespace minke::testing_support {

// Counts while it lives; one at a time.
class Allocations {
 public:
  Allocations();
  ~Allocations();
  // By all threads of this name so far: attn-engine, router-engine, expert-engine or compute.
  uint64_t OfThreads(const std::string& name) const;
};

}  // namespace minke::testing_support
