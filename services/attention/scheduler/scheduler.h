// Decides what the next step computes: continuous batching under a token budget, decode before prefill,
// prompts in chunks, preemption by recomputation when pages run out. Owns all sequences and their pages. No
// clock, no I/O. Engine thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "services/attention/latent_cache/page_pool.h"
#include "services/attention/scheduler/sequence.h"
#include "services/attention/scheduler/step_cost.h"

namespace minke::attention {

struct SchedulerLimits {
  int64_t step_tokens_max = 512;  // rows of one step
  int64_t sequences_max = 256;    // running at once
  int64_t waiting_max = 1024;     // admission queue
  // While others decode, a lone prompt is cut so that a step takes at most this many times a step of
  // decoding; 0: prompts always get what is left of step_tokens_max.
  double decode_stretch = 2;
  bool reuse_prefixes = true;  // share pages of finished and running sequences with those that begin the same
};

// Rows [begin, begin + count) of a sequence's tokens.
struct StepChunk {
  Sequence* sequence = nullptr;
  int64_t begin = 0;
  int64_t count = 0;
};

class Scheduler {
 public:
  Scheduler(SchedulerLimits limits, PagePool& pages) : limits_(limits), pages_(pages) {}

  // RESOURCE_EXHAUSTED: the queue is full. INVALID_ARGUMENT: the prompt does not fit the whole cache.
  absl::Status Add(std::unique_ptr<Sequence> sequence);
  // Marks for removal at the next PlanStep; unknown keys are ignored.
  void Cancel(const RequestKey& key);
  void CancelSession(uint64_t session);

  // Removes cancelled sequences, admits waiting ones, and takes the pages the chunks need. Every running
  // sequence has at most one chunk. `ended` is told of sequences whose time is over, waiting
  // (RESOURCE_EXHAUSTED) or not (DEADLINE_EXCEEDED); they are gone afterwards.
  std::vector<StepChunk> PlanStep(absl::Time now,
                                  const std::function<void(const Sequence&, absl::Status)>& ended);

  // What a planned step took, by which the next ones' prompts are cut.
  void StepTook(absl::Duration duration, int64_t decode_rows, int64_t prompt_rows);
  // After a step that computed all its rows: makes the pages it filled findable for others.
  void Publish(Sequence& sequence);
  // Ends a running sequence and gives its pages back.
  void Finish(Sequence* sequence);
  // Whether a sequence that needs one page more could get it, preempting others if need be.
  bool CanGrow(const Sequence& sequence) const;

  int64_t running() const { return std::ssize(running_); }
  int64_t waiting() const { return std::ssize(waiting_); }
  bool HasWork() const { return !running_.empty() || !waiting_.empty(); }
  uint64_t preemptions() const { return preemptions_; }
  // Prompt tokens looked up and found at first admissions.
  uint64_t reuse_queries() const { return reuse_queries_; }
  uint64_t reuse_hits() const { return reuse_hits_; }

 private:
  int64_t PromptBudget(int64_t decode_rows, int64_t budget) const;
  void Reuse(Sequence& sequence);
  bool Reserve(Sequence& sequence, int64_t tokens);
  void ReleasePages(Sequence& sequence);
  void PreemptLast();
  void DropCancelled();
  void DropLate(absl::Time now, const std::function<void(const Sequence&, absl::Status)>& ended);

  const SchedulerLimits limits_;
  PagePool& pages_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in the order of admission
  std::deque<std::unique_ptr<Sequence>> waiting_;
  StepCost cost_;
  uint64_t preemptions_ = 0, reuse_queries_ = 0, reuse_hits_ = 0;
};

}  // namespace minke::attention
