#include "services/gateway/cluster_view/traffic_meter.h"

#include <algorithm>
#include <cmath>

namespace minke::gateway {
namespace {

constexpr double kFirstMs = 0.1;
const double kLogRatio = std::log(1.12);

}  // namespace

void DurationHistogram::Add(std::chrono::nanoseconds time, uint32_t count) {
  const double ms = std::max(static_cast<double>(time.count()) / 1e6, kFirstMs);
  const int bin = std::min(static_cast<int>(std::log(ms / kFirstMs) / kLogRatio), kBins - 1);
  counts_[static_cast<size_t>(bin)] += count;
  total_ += count;
}

void DurationHistogram::Add(const DurationHistogram& other) {
  for (size_t i = 0; i < counts_.size(); ++i) counts_[i] += other.counts_[i];
  total_ += other.total_;
}

std::optional<double> DurationHistogram::QuantileMs(double part) const {
  if (total_ == 0) return std::nullopt;
  const auto rank = static_cast<uint64_t>(part * static_cast<double>(total_ - 1));
  uint64_t below = 0;
  size_t bin = 0;
  while (below + counts_[bin] <= rank) below += counts_[bin++];
  return kFirstMs * std::exp((static_cast<double>(bin) + 0.5) * kLogRatio);
}

TrafficMeter::Bucket& TrafficMeter::NowLocked(Clock::time_point now) {
  const int64_t second = SecondOf(now);
  Bucket& bucket = buckets_[static_cast<size_t>(second) % buckets_.size()];
  if (bucket.second != second) {
    bucket = Bucket{};
    bucket.second = second;
  }
  return bucket;
}

const TrafficMeter::Bucket* TrafficMeter::FindLocked(int64_t second) const {
  if (second < 0) return nullptr;
  const Bucket& bucket = buckets_[static_cast<size_t>(second) % buckets_.size()];
  return bucket.second == second ? &bucket : nullptr;
}

void TrafficMeter::OnStart(Clock::time_point now, size_t prompt_tokens) {
  const std::lock_guard lock(mutex_);
  Bucket& bucket = NowLocked(now);
  ++bucket.sequences;
  bucket.prompt_tokens += static_cast<uint32_t>(prompt_tokens);
}

void TrafficMeter::OnTokens(Clock::time_point now, size_t tokens, std::chrono::nanoseconds since_last,
                            bool first) {
  if (tokens == 0) return;
  const std::lock_guard lock(mutex_);
  Bucket& bucket = NowLocked(now);
  bucket.tokens += static_cast<uint32_t>(tokens);
  if (first) {
    bucket.first_token.Add(since_last, 1);
  } else {
    bucket.token.Add(since_last / static_cast<int64_t>(tokens), static_cast<uint32_t>(tokens));
  }
}

void TrafficMeter::OnFailure(Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  ++NowLocked(now).failed;
}

TrafficMeter::Summary TrafficMeter::Summarise(Clock::time_point now) const {
  Summary summary;
  const std::lock_guard lock(mutex_);
  const int64_t running = SecondOf(now);
  for (int64_t second = running - kSeriesSeconds; second < running; ++second) {
    const Bucket* bucket = FindLocked(second);
    Second& out = summary.series.emplace_back();
    if (bucket == nullptr) continue;
    out = {bucket->tokens, bucket->first_token.QuantileMs(0.5), bucket->token.QuantileMs(0.5)};
  }
  DurationHistogram first_token, token;
  uint64_t tokens = 0, prompt_tokens = 0, sequences = 0;
  for (int64_t second = std::max<int64_t>(0, running - kWindowSeconds); second < running; ++second) {
    const Bucket* bucket = FindLocked(second);
    if (bucket == nullptr) continue;
    tokens += bucket->tokens;
    prompt_tokens += bucket->prompt_tokens;
    sequences += bucket->sequences;
    summary.failed += bucket->failed;
    first_token.Add(bucket->first_token);
    token.Add(bucket->token);
  }
  const auto seconds = static_cast<double>(std::clamp<int64_t>(running, 1, kWindowSeconds));
  summary.tokens_per_s = static_cast<double>(tokens) / seconds;
  summary.prompt_tokens_per_s = static_cast<double>(prompt_tokens) / seconds;
  summary.sequences_per_s = static_cast<double>(sequences) / seconds;
  summary.first_token = {first_token.QuantileMs(0.5), first_token.QuantileMs(0.95)};
  summary.token = {token.QuantileMs(0.5), token.QuantileMs(0.95)};
  return summary;
}

}  // namespace minke::gateway
