// A queue that grows to its high-water mark and then allocates nothing.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace minke::transport::internal {

// Thread-compatible. T is default-constructible and movable.
template <typename T>
class Ring {
 public:
  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }
  T& front() { return slots_[begin_]; }
  T& operator[](size_t i) { return slots_[(begin_ + i) & (slots_.size() - 1)]; }

  void push_back(T value) {
    if (size_ == slots_.size()) Grow();
    slots_[(begin_ + size_) & (slots_.size() - 1)] = std::move(value);
    ++size_;
  }

  T pop_front() {
    T value = std::exchange(slots_[begin_], T());
    begin_ = (begin_ + 1) & (slots_.size() - 1);
    --size_;
    return value;
  }

 private:
  void Grow() {
    std::vector<T> larger(slots_.empty() ? 64 : slots_.size() * 2);
    for (size_t i = 0; i < size_; ++i) larger[i] = std::move((*this)[i]);
    slots_ = std::move(larger);
    begin_ = 0;
  }

  std::vector<T> slots_;  // a power of two of them
  size_t begin_ = 0;
  size_t size_ = 0;
};

}  // namespace minke::transport::internal
