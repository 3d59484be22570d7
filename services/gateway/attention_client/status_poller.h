// Asks all attention nodes for their load once a second (Attention.GetStatus), so that the gateway can show
// the cluster's. Thread-safe; one thread of its own beside gRPC's callbacks.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "services/gateway/attention_client/attention_pool.h"
#include "services/gateway/metrics/vllm_names.h"

namespace minke::gateway {

class StatusPoller {
 public:
  // identity: at the nodes; null: plaintext.
  explicit StatusPoller(std::shared_ptr<tls::Identity> identity = nullptr,
                        std::chrono::milliseconds period = std::chrono::seconds(1));
  ~StatusPoller();

  // All attention nodes there are now.
  void UpdateNodes(const std::vector<AttentionNode>& nodes);
  // Over nodes whose last answer is at most three periods old. Counters of nodes that have gone stay in the
  // sums, so that these never fall.
  EngineTotals totals() const;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;  // shared with calls under way
};

}  // namespace minke::gateway
