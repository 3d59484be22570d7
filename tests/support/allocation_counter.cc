#include "tests/support/allocation_counter.h"

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace minke::testing_support {
namespace {

constexpr const char* kNames[] = {"attn-engine", "router-engine", "expert-engine", "compute"};
std::atomic<bool> counting{false};
std::atomic<uint64_t> counts[std::size(kNames)];

void* Allocate(size_t bytes, size_t alignment) {
  if (counting.load(std::memory_order_relaxed)) {
    char name[16] = "";
    pthread_getname_np(pthread_self(), name, sizeof name);
    for (size_t i = 0; i < std::size(kNames); ++i) {
      if (std::strcmp(name, kNames[i]) == 0) ++counts[i];
    }
  }
  void* p = alignment <= alignof(std::max_align_t)
                ? std::malloc(bytes)
                : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

Allocations::Allocations() {
  for (auto& count : counts) count = 0;
  counting = true;
}
Allocations::~Allocations() { counting = false; }

uint64_t Allocations::OfThreads(const std::string& name) const {
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return counts[i];
  }
  return ~uint64_t{0};  // not a name that is counted
}

}  // namespace minke::testing_support

void* operator new(size_t bytes) { return minke::testing_support::Allocate(bytes, 0); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return minke::testing_support::Allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
