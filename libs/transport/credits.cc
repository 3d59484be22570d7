#include "libs/transport/credits.h"

#include <algorithm>

namespace minke::transport::internal {

CreditAccount::CreditAccount(uint32_t granted, int64_t ttl_ns)
    : available_(granted), ttl_ns_(std::max<int64_t>(ttl_ns, kBucketsPerTtl)) {}

bool CreditAccount::Take(uint32_t rows, int64_t now_ns) {
  Expire(now_ns);
  if (rows > available_) return false;
  if (rows == 0) return true;
  available_ -= rows;
  const int last = (first_ + count_ - 1 + kNumBuckets) % kNumBuckets;
  const bool fits_last = count_ > 0 && now_ns - buckets_[last].begin_ns < ttl_ns_ / kBucketsPerTtl;
  if (fits_last || count_ == kNumBuckets) {
    buckets_[last].rows += rows;
  } else {
    buckets_[(first_ + count_++) % kNumBuckets] = {now_ns, rows};
  }
  return true;
}

void CreditAccount::Return(uint32_t rows) {
  while (rows > 0 && count_ > 0) {
    const uint32_t freed = std::min(rows, oldest().rows);
    oldest().rows -= freed;
    available_ += freed;
    rows -= freed;
    if (oldest().rows == 0) DropOldest();
  }
}

void CreditAccount::Expire(int64_t now_ns) {
  // A bucket's rows were all taken within ttl / 32 after its beginning.
  while (count_ > 0 && now_ns - oldest().begin_ns >= ttl_ns_ + ttl_ns_ / kBucketsPerTtl) {
    available_ += oldest().rows;
    forgiven_ += oldest().rows;
    DropOldest();
  }
}

void CreditAccount::DropOldest() {
  first_ = (first_ + 1) % kNumBuckets;
  --count_;
}

}  // namespace minke::transport::internal
