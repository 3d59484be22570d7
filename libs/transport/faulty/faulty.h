// A transport that loses, repeats, delays and reorders frames, for tests. Deterministic: the n-th frame sent
// meets the same fate under the same seed. Only the application's frames are affected; credit of lost ones
// comes back by its time to live.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/time/time.h"
#include "libs/transport/transport.h"

namespace minke::transport {

struct FaultOptions {
  uint64_t seed = 1;
  // Drawn independently for each frame. A dropped frame meets nothing else; a duplicated one is sent once
  // more at once, whatever happens to the first.
  double drop_probability = 0;
  double duplicate_probability = 0;
  double delay_probability = 0;
  absl::Duration delay_max = absl::Milliseconds(10);  // uniform up to this
  double reorder_probability = 0;
  uint32_t reorder_span_max =
      8;  // held back until 1 ... this many later frames were sent, or delay_max is over
  uint32_t held_frames_max = 4096;  // beyond it frames are sent at once
  // Bit k: frames of kind k are affected. Drawing does not depend on it.
  uint64_t kinds = ~uint64_t{0};
};

struct FaultCounts {
  uint64_t frames = 0;  // Send() called for a peer that was up, affected kinds
  uint64_t dropped = 0, duplicated = 0, delayed = 0, reordered = 0;
};

// Threads as Transport says. Held frames go out in Poll().
class FaultyTransport final : public Transport {
 public:
  FaultyTransport(std::unique_ptr<Transport> inner, FaultOptions options);

  FaultCounts counts() const;  // any thread

  NodeId self() const override { return inner_->self(); }
  std::string address() const override { return inner_->address(); }
  FramePool& frames() override { return inner_->frames(); }
  RowMemory* row_memory() const override { return inner_->row_memory(); }
  absl::Status Connect(NodeId peer, std::string_view address) override {
    return inner_->Connect(peer, address);
  }
  void Disconnect(NodeId peer) override;
  absl::Status Send(NodeId peer, FrameRef frame) override;
  bool TakeCredit(NodeId peer, wire::TrafficClass traffic_class, uint32_t rows) override {
    return inner_->TakeCredit(peer, traffic_class, rows);
  }
  void ReturnCredit(NodeId peer, wire::TrafficClass traffic_class, uint32_t rows) override {
    inner_->ReturnCredit(peer, traffic_class, rows);
  }
  int Poll(absl::FunctionRef<void(Event&)> handler) override;
  void Wait(absl::Duration timeout) override;
  void Wake() override { inner_->Wake(); }
  std::vector<PeerStatistics> statistics() const override { return inner_->statistics(); }
  std::vector<PeerStatistics> all_statistics() const override { return inner_->all_statistics(); }
  uint64_t bad_frames() const override { return inner_->bad_frames(); }

 private:
  struct Held {
    NodeId peer;
    FrameRef frame;
    absl::Time due;
    uint64_t due_at_frame;  // or when this many frames were sent
  };

  double Draw();  // [0, 1)
  void ReleaseDue(bool look_at_clock);
  void ForgetPeer(NodeId peer);

  const FaultOptions options_;
  const std::unique_ptr<Transport> inner_;
  uint64_t random_state_;
  uint64_t frames_sent_ = 0;
  std::vector<Held> held_;
  absl::flat_hash_set<NodeId> up_;
  std::atomic<uint64_t> frames_{0}, dropped_{0}, duplicated_{0}, delayed_{0}, reordered_{0};
};

std::unique_ptr<FaultyTransport> CreateFaulty(std::unique_ptr<Transport> inner, FaultOptions options);

}  // namespace minke::transport
