// The gateway's sessions with the attention nodes: one bidirectional stream per node carries all of its
// sequences. A sequence goes to the ready node whose latent cache holds most of its prompt, unless that node
// has far more to do than others; else to the one with the fewest sequences. When a node's session is lost
// its sequences go on elsewhere under a new generation, with the tokens the client already has, so that the
// client's stream does not notice. So do those of a node that is silent for two heartbeats or that drains, as
// soon as another one is ready; in the latter case the new node is told whose latents it can take over.
// Thread-safe. One thread of its own (reconnecting, waiting
// sequences) beside gRPC's callbacks.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "libs/tls/identity.h"
#include "services/gateway/generation/admission.h"
#include "services/gateway/generation/sequence_pool.h"

namespace minke::gateway {

struct AttentionNode {
  uint64_t node_id = 0;
  std::string address;    // host:port of its gRPC server
  bool ready = false;     // takes new sequences
  bool draining = false;  // about to leave: gets nothing new, and what it has goes elsewhere
};

struct AttentionPoolOptions {
  std::chrono::milliseconds node_wait_max{
      60'000};  // a sequence waits so long for a node, then fails: UNAVAILABLE
  // A node gone from the view, or silent, keeps its session so long; then it is connected anew.
  std::chrono::milliseconds absent_grace{5'000};
  std::chrono::milliseconds heartbeat{250};  // a node silent for two of these loses its sequences to others
  std::chrono::milliseconds reconnect_min{50};  // pause after a lost session; doubles
  std::chrono::milliseconds reconnect_max{2'000};
  uint32_t waiting_ms_max = 0;  // in a node's admission queue; 0: no limit
  // A sequence that was aboard so many nodes that went without draining fails: INTERNAL. A silent node counts
  // only if it does not speak again.
  int lost_sessions_max = 2;
  std::shared_ptr<tls::Identity> identity = nullptr;  // at the nodes; null: plaintext
};

class AttentionPool final : public SequencePool {
 public:
  // `on_connected` is called by the pool's own thread, without locks, when a first ready node has a session
  // (true) and when the last one has lost it (false). `counters` is borrowed.
  AttentionPool(AttentionPoolOptions options, GatewayCounters* counters,
                std::function<void(bool)> on_connected);
  // Ends the sessions; sequences that are left get UNAVAILABLE.
  ~AttentionPool() override;

  // All attention nodes there are now.
  void UpdateNodes(const std::vector<AttentionNode>& nodes);
  uint64_t Start(SequenceSpec spec, std::shared_ptr<SequenceSink> sink) override;
  void Cancel(uint64_t sequence) override;

  class Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace minke::gateway
