#include "services/attention/scheduler/scheduler.h"

#include <algorithm>

#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::attention {

absl::Status Scheduler::Add(std::unique_ptr<Sequence> sequence) {
  if (PagesFor(std::ssize(sequence->tokens)) > pages_.total()) {
    return absl::InvalidArgumentError(
        StrCat("prompt of ", sequence->tokens.size(), " tokens: expected at most ",
               pages_.total() * kernels::kPageTokens, ", the size of this node's latent cache"));
  }
  if (std::ssize(waiting_) >= limits_.waiting_max) {
    return absl::ResourceExhaustedError(
        StrCat("the admission queue is full (", limits_.waiting_max, " requests)"));
  }
  waiting_.push_back(std::move(sequence));
  return absl::OkStatus();
}

void Scheduler::Cancel(const RequestKey& key) {
  for (auto& sequence : running_) sequence->cancelled |= sequence->request.key == key;
  for (auto& sequence : waiting_) sequence->cancelled |= sequence->request.key == key;
}

void Scheduler::CancelSession(uint64_t session) {
  for (auto& sequence : running_) sequence->cancelled |= sequence->request.key.session == session;
  for (auto& sequence : waiting_) sequence->cancelled |= sequence->request.key.session == session;
}

void Scheduler::ReleasePages(Sequence& sequence) {
  // The end first: of pages kept for reuse the oldest go first, and a prefix without its beginning is of no
  // use.
  for (auto page = sequence.pages.rbegin(); page != sequence.pages.rend(); ++page) pages_.Release(*page);
  sequence.pages.clear();
  sequence.computed = 0;
  sequence.published = {};
  sequence.published_pages = 0;
}

// Takes the pages that hold a beginning of `sequence` already. At least one token is left to compute: its
// logits are wanted. Prompt log-probabilities need every row, so they are computed anew.
void Scheduler::Reuse(Sequence& sequence) {
  const bool every_row = sequence.request.sampling.want_prompt_logprobs &&
                         sequence.prompt_logprobs_done + 1 < sequence.prompt_size();
  if (!limits_.reuse_prefixes || every_row) return;
  const size_t whole = (sequence.tokens.size() - 1) / kernels::kPageTokens * kernels::kPageTokens;
  sequence.pages = pages_.Match(std::span(sequence.tokens).first(whole), sequence.published);
  sequence.published_pages = std::ssize(sequence.pages);
  sequence.computed = sequence.published_pages * kernels::kPageTokens;
}

void Scheduler::Publish(Sequence& sequence) {
  if (!limits_.reuse_prefixes) return;
  for (int64_t begin = sequence.published_pages * kernels::kPageTokens;
       begin + kernels::kPageTokens <= sequence.computed; begin += kernels::kPageTokens) {
    sequence.published = pages_.Publish(sequence.pages[sequence.published_pages++], sequence.published,
                                        std::span(sequence.tokens).subspan(begin, kernels::kPageTokens));
  }
}

void Scheduler::DropCancelled() {
  for (auto& sequence : running_) {
    if (sequence->cancelled) ReleasePages(*sequence);
  }
  std::erase_if(running_, [](const auto& sequence) { return sequence->cancelled; });
  std::erase_if(waiting_, [](const auto& sequence) { return sequence->cancelled; });
}

void Scheduler::DropLate(absl::Time now, const std::function<void(const Sequence&, absl::Status)>& ended) {
  const auto late = [&](const std::unique_ptr<Sequence>& sequence) {
    if (sequence->request.deadline >= now) return false;
    ended(*sequence, absl::DeadlineExceededError(StrCat("the request's deadline passed after ",
                                                        sequence->generated_size(), " generated tokens")));
    ReleasePages(*sequence);
    return true;
  };
  const auto not_admitted = [&](const std::unique_ptr<Sequence>& sequence) {
    if (sequence->request.waiting_until >= now || sequence->computed > 0 ||
        sequence->generated_size() > std::ssize(sequence->request.generated))
      return false;
    ended(*sequence, absl::ResourceExhaustedError("not admitted in time: the attention node is overloaded"));
    return true;
  };
  std::erase_if(running_, late);
  std::erase_if(waiting_, [&](const auto& sequence) { return late(sequence) || not_admitted(sequence); });
}

void Scheduler::Finish(Sequence* sequence) {
  auto it =
      std::find_if(running_.begin(), running_.end(), [&](const auto& s) { return s.get() == sequence; });
  MK_CHECK(it != running_.end());
  ReleasePages(**it);
  running_.erase(it);
}

void Scheduler::PreemptLast() {
  std::unique_ptr<Sequence> victim = std::move(running_.back());
  running_.pop_back();
  ReleasePages(*victim);
  waiting_.push_front(std::move(victim));
  ++preemptions_;
}

bool Scheduler::CanGrow(const Sequence& sequence) const {
  // Alone, a sequence may have every page.
  return PagesFor(std::ssize(sequence.tokens)) <= pages_.total();
}

// Takes pages until `sequence` has room for `tokens`; preempts the youngest sequences for it. False if
// `sequence` was itself the youngest and had to go.
bool Scheduler::Reserve(Sequence& sequence, int64_t tokens) {
  while (std::ssize(sequence.pages) < PagesFor(tokens)) {
    if (std::optional<uint32_t> page = pages_.Take()) {
      sequence.pages.push_back(*page);
      continue;
    }
    const bool self = running_.back().get() == &sequence;
    PreemptLast();
    if (self) return false;
  }
  return true;
}

void Scheduler::StepTook(absl::Duration duration, int64_t decode_rows, int64_t prompt_rows) {
  cost_.Took(absl::ToDoubleSeconds(duration), decode_rows, prompt_rows);
}

// Prompt rows of a step with `decode_rows` decoding sequences. A lone prompt gets as much time as they do
// together; the more prompts wait compared to them, the more: a crowd that has no first token yet goes before
// tokens that come a bit later.
int64_t Scheduler::PromptBudget(int64_t decode_rows, int64_t budget) const {
  constexpr int64_t kRowsMin = 8;     // a prompt always moves on
  constexpr int64_t kRowsTrial = 64;  // tell what a row costs
  constexpr double kCrowd = 8;        // goes first, whatever it costs
  if (limits_.decode_stretch == 0 || decode_rows == 0) return budget;
  double prompts = static_cast<double>(waiting_.size());
  for (const auto& sequence : running_) prompts += std::ssize(sequence->tokens) - sequence->computed > 1;
  const double share = std::max(1.0, prompts * prompts / static_cast<double>(decode_rows));
  if (prompts == 0 || share >= kCrowd) return budget;
  const std::optional<double> decode = cost_.DecodeSeconds(decode_rows), row = cost_.PromptRowSeconds();
  if (!decode.has_value()) return row.has_value() ? 0 : budget;
  const double rows = row.has_value() ? *decode * std::max(0.0, limits_.decode_stretch - 1) * share / *row
                                      : static_cast<double>(kRowsTrial);
  return rows >= static_cast<double>(budget)
             ? budget
             : std::min(budget, std::max(kRowsMin, static_cast<int64_t>(rows)));
}

std::vector<StepChunk> Scheduler::PlanStep(absl::Time now,
                                           const std::function<void(const Sequence&, absl::Status)>& ended) {
  DropCancelled();
  DropLate(now, ended);
  std::vector<StepChunk> chunks;
  int64_t budget = limits_.step_tokens_max;
  const auto left = [](const Sequence& s) { return std::ssize(s.tokens) - s.computed; };
  const auto take = [&](Sequence& sequence, int64_t count) {
    chunks.push_back({&sequence, sequence.computed, count});
    budget -= count;
  };
  // Decode first: one row each. Preemption takes from the end, so earlier ones are safe.
  for (size_t i = 0; i < running_.size() && budget > 0; ++i) {
    Sequence& sequence = *running_[i];
    if (left(sequence) == 1 && Reserve(sequence, sequence.computed + 1)) take(sequence, 1);
  }
  budget = PromptBudget(std::ssize(chunks), budget);
  for (size_t i = 0; i < running_.size() && budget > 0; ++i) {
    Sequence& sequence = *running_[i];
    const int64_t count = std::min(budget, left(sequence));
    // Prefill waits for pages instead of taking them from sequences that already produce.
    if (left(sequence) <= 1 ||
        PagesFor(sequence.computed + count) - std::ssize(sequence.pages) > pages_.available())
      continue;
    MK_CHECK(Reserve(sequence, sequence.computed + count));
    take(sequence, count);
  }
  while (!waiting_.empty() && budget > 0 && std::ssize(running_) < limits_.sequences_max) {
    Sequence& sequence = *waiting_.front();
    // Room for the whole prompt and the first new token, so that admission does not lead to preemption at
    // once.
    Reuse(sequence);
    const int64_t have = std::ssize(sequence.pages);
    if (PagesFor(std::ssize(sequence.tokens) + 1) - have > pages_.available() &&
        !(running_.empty() && PagesFor(std::ssize(sequence.tokens)) - have <= pages_.available())) {
      ReleasePages(sequence);
      break;
    }
    if (sequence.cached_tokens < 0) {
      sequence.cached_tokens = std::min(sequence.computed, sequence.prompt_size());
      reuse_queries_ += sequence.prompt_size();
      reuse_hits_ += sequence.cached_tokens;
      if (sequence.request.received > absl::InfinitePast())
        sequence.queue_time = now - sequence.request.received;
    }
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
    const int64_t count = std::min(budget, left(sequence));
    MK_CHECK(Reserve(sequence, sequence.computed + count));
    take(sequence, count);
  }
  // A chunk's sequence may have been preempted after its chunk was planned.
  std::erase_if(chunks, [](const StepChunk& chunk) {
    return std::ssize(chunk.sequence->pages) < PagesFor(chunk.begin + chunk.count);
  });
  if (chunks.empty() && !running_.empty())
    PreemptLast();  // prefills that block each other: the oldest goes on
  return chunks;
}

}  // namespace minke::attention
