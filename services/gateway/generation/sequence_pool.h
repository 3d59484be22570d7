// Where sequences go: the seam between the API edges and attention_client, so that the edges are tested
// without gRPC.
#pragma once

#include <cstdint>
#include <memory>

#include "services/gateway/generation/types.h"

namespace minke::gateway {

// Receives one sequence's events, in order, the last one with a finish reason. Called from any thread, never
// concurrently for one sequence; must not block. A few events may still come after Cancel.
class SequenceSink {
 public:
  virtual ~SequenceSink() = default;
  virtual void OnEvent(SequenceEvent event) = 0;
};

// Thread-safe.
class SequencePool {
 public:
  virtual ~SequencePool() = default;
  // Never blocks; whatever goes wrong is the sink's last event. The sink is shared with the pool until then.
  virtual uint64_t Start(SequenceSpec spec, std::shared_ptr<SequenceSink> sink) = 0;
  // Nothing if it has finished.
  virtual void Cancel(uint64_t sequence) = 0;
};

}  // namespace minke::gateway
