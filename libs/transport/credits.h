// Rows of credit of one traffic class towards one peer: how many more rows this node may send it.
#pragma once

#include <array>
#include <cstdint>

namespace minke::transport::internal {

// Always available + taken == granted. Thread-compatible; allocates nothing; times are steady-clock
// nanoseconds.
class CreditAccount {
 public:
  CreditAccount() = default;
  CreditAccount(uint32_t granted, int64_t ttl_ns);

  // All or nothing. Credit taken longer ago than the time to live is forgiven first.
  bool Take(uint32_t rows, int64_t now_ns);
  // The peer gave rows back: the oldest taken rows are free again. More than was taken (a late answer after
  // forgiveness, a duplicated message) is ignored.
  void Return(uint32_t rows);

  uint32_t available() const { return available_; }
  uint64_t forgiven() const { return forgiven_; }

 private:
  struct Bucket {
    int64_t begin_ns = 0;
    uint32_t rows = 0;
  };
  // Rows taken within the same 1/32 of the time to live share a bucket, so 34 buckets cover everything
  // younger than it and forgiveness is late by at most that 1/32.
  static constexpr int kBucketsPerTtl = 32;
  static constexpr int kNumBuckets = kBucketsPerTtl + 2;

  void Expire(int64_t now_ns);
  Bucket& oldest() { return buckets_[first_]; }
  void DropOldest();

  uint32_t available_ = 0;
  int64_t ttl_ns_ = 0;
  uint64_t forgiven_ = 0;
  std::array<Bucket, kNumBuckets> buckets_;
  int first_ = 0;
  int count_ = 0;
};

}  // namespace minke::transport::internal
