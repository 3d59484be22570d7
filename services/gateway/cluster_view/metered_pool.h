// A sequence pool whose sequences are timed on their way: every request of either API passes here.
// Thread-safe.
#pragma once

#include <memory>
#include <utility>

#include "services/gateway/cluster_view/traffic_meter.h"
#include "services/gateway/generation/sequence_pool.h"

namespace minke::gateway {

class MeteredPool final : public SequencePool {
 public:
  // `pool` and `meter` are borrowed and outlive every sequence.
  MeteredPool(SequencePool* pool, TrafficMeter* meter) : pool_(*pool), meter_(*meter) {}

  uint64_t Start(SequenceSpec spec, std::shared_ptr<SequenceSink> sink) override {
    const auto now = TrafficMeter::Clock::now();
    meter_.OnStart(now, spec.prompt->size());
    return pool_.Start(std::move(spec), std::make_shared<Sink>(std::move(sink), &meter_, now));
  }
  void Cancel(uint64_t sequence) override { pool_.Cancel(sequence); }

 private:
  // Of one sequence, whose events never come concurrently.
  class Sink final : public SequenceSink {
   public:
    Sink(std::shared_ptr<SequenceSink> next, TrafficMeter* meter, TrafficMeter::Clock::time_point start)
        : next_(std::move(next)), meter_(*meter), last_(start) {}
    void OnEvent(SequenceEvent event) override {
      const auto now = TrafficMeter::Clock::now();
      if (!event.token_ids.empty()) {
        meter_.OnTokens(now, event.token_ids.size(), now - last_, std::exchange(first_, false));
        last_ = now;
      }
      if (event.finish == FinishReason::kError) meter_.OnFailure(now);
      next_->OnEvent(std::move(event));
    }

   private:
    const std::shared_ptr<SequenceSink> next_;  // shared with whoever answers the client
    TrafficMeter& meter_;
    TrafficMeter::Clock::time_point last_;
    bool first_ = true;
  };

  SequencePool& pool_;
  TrafficMeter& meter_;
};

}  // namespace minke::gateway
