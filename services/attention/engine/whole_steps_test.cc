// The engine over a model that has the routed experts too (WholeSteps), as on a GPU, with a model that needs
// none: the next token's logits are a pure function of the tokens before it, which the model reads back
// through the pages of its cache. So a row at a wrong place, a stale page or a missing chunk changes a text.
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "libs/transport/inproc/inproc.h"
#include "services/attention/engine/engine.h"

namespace minke::attention {
namespace {

constexpr int64_t kPageTokens = kernels::kPageTokens;
constexpr int64_t kNaiveRowsMin = 16;  // chunks of so many rows come after the others
constexpr uint32_t kPoison = 500;      // a prompt that has it makes no numbers

std::vector<float> LogitsAfter(std::span<const uint32_t> tokens, int64_t vocab) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const uint32_t token : tokens) hash = (hash ^ token) * 0x100000001b3ull;
  std::mt19937 rng(static_cast<uint32_t>(hash ^ hash >> 32));
  std::vector<float> logits(vocab);
  for (float& v : logits) v = static_cast<float>(rng() % 8192) / 1024 - 4;
  logits[kPoison] = -1000;  // nobody generates it
  return logits;
}

// Seen on the engine's thread; read by tests after the engine has stopped.
struct Seen {
  int64_t steps = 0, rows_max = 0;
  int64_t mixed_steps = 0;      // with decoding rows beside a prompt
  int64_t later_chunks = 0;     // of a prompt, not its first
  int64_t drawn = 0, left = 0;  // draws by the model, and rows of which only the logits were wanted
};

class FakeWholeModel final : public AttentionModel, public WholeSteps {
 public:
  FakeWholeModel(int64_t pages, int64_t rows_max, std::vector<uint8_t> allowed, Seen& seen)
      : config_(testing_support::TinyConfig()),
        rows_max_(rows_max),
        allowed_(std::move(allowed)),
        cache_(pages * kPageTokens),
        seen_(seen) {}

  const ModelConfig& config() const override { return config_; }
  Precision precision() const override { return Precision::kBF16; }
  int64_t CacheBytesPerToken() const override { return 1; }
  absl::Status Prepare(const ModelLimits&) override { return absl::OkStatus(); }
  int64_t cache_pages() const override { return std::ssize(cache_) / kPageTokens; }
  kernels::MlaForm FormOf(int64_t rows, int64_t) const override {
    return rows < kNaiveRowsMin ? kernels::MlaForm::kAbsorbed : kernels::MlaForm::kNaive;
  }
  WholeSteps* whole() override { return this; }

  bool CanDraw(const SamplingParams& p) const override {
    return p.presence_penalty == 0 && p.frequency_penalty == 0 && p.repetition_penalty == 1 &&
           p.logit_bias.empty();
  }

  void Step(const Microbatch& batch, std::span<const DrawRow> draws, std::span<uint32_t> tokens) override {
    ASSERT_EQ(draws.size(), tokens.size());
    CheckRows(batch);
    logits_.clear();
    for (size_t i = 0; i < draws.size(); ++i) {
      const DrawRow& draw = draws[i];
      if (i > 0) {
        ASSERT_GT(draw.row, draws[i - 1].row);
      }
      const std::vector<uint32_t> prefix = PrefixOf(batch, draw.row);
      std::vector<float>& logits = logits_[draw.row] = LogitsAfter(prefix, config_.vocab_size);
      ++(draw.params == nullptr ? seen_.left : seen_.drawn);
      tokens[i] = kNoToken;
      if (draw.params == nullptr || std::count(prefix.begin(), prefix.end(), kPoison) > 0) continue;
      ASSERT_TRUE(CanDraw(*draw.params));
      std::vector<float> scratch = logits;
      tokens[i] = Sample(*draw.params, {}, allowed_, draw.position, scratch);
    }
  }

  void Logits(const Microbatch&, std::span<const int32_t> selected, float* logits) override {
    for (size_t i = 0; i < selected.size(); ++i) {
      ASSERT_TRUE(logits_.contains(selected[i])) << "the step was not told of row " << selected[i];
      std::copy(logits_[selected[i]].begin(), logits_[selected[i]].end(), logits + i * config_.vocab_size);
    }
  }

  // Never called.
  void ReadPage(int32_t, uint32_t, std::byte*) override { FAIL(); }
  void WritePage(int32_t, uint32_t, const std::byte*) override { FAIL(); }
  void Embed(const Microbatch&) override { FAIL(); }
  void Attention(int32_t, const Microbatch&, std::byte*) override { FAIL(); }
  void FeedForward(int32_t, const Microbatch&) override { FAIL(); }
  float* RoutedTarget(const Microbatch&) override { return nullptr; }
  void AddRouted(const Microbatch&) override { FAIL(); }

 private:
  // Takes the rows into the cache.
  void CheckRows(const Microbatch& batch) {
    ++seen_.steps;
    seen_.rows_max = std::max(seen_.rows_max, batch.size());
    ASSERT_LE(batch.size(), rows_max_);
    bool naive = false, decoding = false, prompt = false;
    int64_t next = 0;
    for (const kernels::MlaChunk& chunk : batch.chunks) {
      ASSERT_EQ(chunk.row_begin, next);
      ASSERT_EQ(chunk.form, FormOf(chunk.rows, chunk.position_begin));
      ASSERT_FALSE(naive && chunk.form == kernels::MlaForm::kAbsorbed) << "absorbed chunks come first";
      naive = chunk.form == kernels::MlaForm::kNaive;
      (chunk.rows == 1 ? decoding : prompt) = true;
      seen_.later_chunks += chunk.rows > 1 && chunk.position_begin > 0;
      for (int64_t i = 0; i < chunk.rows; ++i, ++next) {
        const StepRow& row = batch.rows[next];
        ASSERT_EQ(row.position, chunk.position_begin + i);
        ASSERT_EQ(row.page, chunk.pages[row.position / kPageTokens]);
        ASSERT_EQ(row.page_slot, row.position % kPageTokens);
        cache_[row.page * kPageTokens + row.page_slot] = row.token;
      }
    }
    ASSERT_EQ(next, batch.size());
    seen_.mixed_steps += decoding && prompt;
  }

  std::vector<uint32_t> PrefixOf(const Microbatch& batch, int64_t row) const {
    for (const kernels::MlaChunk& chunk : batch.chunks) {
      if (row >= chunk.row_begin + chunk.rows) continue;
      std::vector<uint32_t> prefix;
      for (int64_t p = 0; p <= chunk.position_begin + row - chunk.row_begin; ++p) {
        prefix.push_back(cache_[chunk.pages[p / kPageTokens] * kPageTokens + p % kPageTokens]);
      }
      return prefix;
    }
    ADD_FAILURE() << "row " << row << " of " << batch.size();
    return {};
  }

  const ModelConfig config_;
  const int64_t rows_max_;
  const std::vector<uint8_t> allowed_;
  std::vector<uint32_t> cache_;                   // the token of every slot
  std::map<int32_t, std::vector<float>> logits_;  // of the last step's draws, by row
  Seen& seen_;
};

struct Outcome {
  std::vector<uint32_t> tokens;
  std::vector<TokenLogprobs> logprobs, prompt_logprobs;
  FinishReason finish = FinishReason::kNone;
  absl::Status error;
};

struct HarnessOptions {
  int64_t pages = 256;
  SchedulerLimits limits = {.step_tokens_max = 48};
  std::vector<uint8_t> allowed;
};

class Harness {
 public:
  explicit Harness(HarnessOptions options = {}) : pool_(2) {
    EngineOptions engine;
    engine.limits = options.limits;
    engine_ = std::make_unique<Engine>(
        std::make_unique<FakeWholeModel>(options.pages, options.limits.step_tokens_max, options.allowed,
                                         seen),
        transport::CreateInproc(hub_, {.node_id = RandomNodeId(), .role = 3}), nullptr, pool_, engine,
        options.allowed, [this](EngineOutput output) { Take(std::move(output)); });
    thread_ = std::thread([this] { engine_->Run(); });
  }
  ~Harness() { Stop(); }
  void Stop() {
    if (!thread_.joinable()) return;
    engine_->Stop();
    thread_.join();
  }

  // Submits all at once and waits for every end.
  std::vector<Outcome> Run(const std::vector<Request>& requests) {
    for (Request request : requests) EXPECT_TRUE(engine_->Submit(std::move(request)).ok());
    std::vector<Outcome> outcomes;
    for (const Request& request : requests) {
      outcomes.push_back(
          WaitFor(request.key, [](const Outcome& o) { return o.finish != FinishReason::kNone; }));
    }
    return outcomes;
  }

  template <class Condition>
  Outcome WaitFor(const RequestKey& key, Condition condition) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return condition(outcomes_[key]); }));
    return outcomes_[key];
  }

  Engine& engine() { return *engine_; }
  Seen seen;

 private:
  void Take(EngineOutput output) {
    const std::lock_guard lock(mutex_);
    for (RequestEvent& event : output.events) {
      Outcome& o = outcomes_[event.key];
      EXPECT_EQ(o.finish, FinishReason::kNone) << "an event after the last";
      o.tokens.insert(o.tokens.end(), event.tokens.begin(), event.tokens.end());
      o.logprobs.insert(o.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
      o.prompt_logprobs.insert(o.prompt_logprobs.end(), event.prompt_logprobs.begin(),
                               event.prompt_logprobs.end());
      o.finish = event.finish;
      o.error = event.error;
    }
    changed_.notify_all();
  }

  ThreadPool pool_;
  transport::InprocHub hub_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<RequestKey, Outcome> outcomes_;
  std::unique_ptr<Engine> engine_;
  std::thread thread_;
};

int64_t Vocab() { return testing_support::TinyConfig().vocab_size; }

Request MakeRequest(uint64_t id, int64_t prompt, uint32_t max_tokens,
                    SamplingParams sampling = {.temperature = 0}) {
  Request request;
  request.key = {1, id, 0};
  std::mt19937 rng(static_cast<uint32_t>(id));
  for (int64_t i = 0; i < prompt; ++i) request.prompt.push_back(rng() % kPoison);
  request.sampling = std::move(sampling);
  request.sampling.max_tokens = max_tokens;
  return request;
}

// What the request must give, computed alone.
Outcome Expected(const Request& request, const std::vector<uint8_t>& allowed = {}) {
  Outcome want;
  Sequence sequence(request);
  const SamplingParams& p = request.sampling;
  for (size_t i = 1; p.want_prompt_logprobs && i < request.prompt.size(); ++i) {
    want.prompt_logprobs.push_back(Logprobs(LogitsAfter(std::span(request.prompt).first(i), Vocab()),
                                            request.prompt[i], p.top_prompt_logprobs));
  }
  while (sequence.generated_size() < p.max_tokens) {
    std::vector<float> logits = LogitsAfter(sequence.tokens, Vocab());
    const std::vector<float> plain = logits;
    const uint32_t token = Sample(p, sequence.counts, allowed, std::ssize(sequence.tokens), logits);
    if (p.want_logprobs) want.logprobs.push_back(Logprobs(plain, token, p.top_logprobs));
    sequence.tokens.push_back(token);
    ++sequence.counts.generated[token];
    want.tokens.push_back(token);
    if (std::count(p.stop_token_ids.begin(), p.stop_token_ids.end(), token) > 0) break;
  }
  return want;
}

void ExpectSame(const std::vector<TokenLogprobs>& got, const std::vector<TokenLogprobs>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(got[i].token, want[i].token) << i;
    EXPECT_EQ(got[i].logprob, want[i].logprob) << i;
    EXPECT_EQ(got[i].top, want[i].top) << i;
  }
}

void ExpectAsAlone(const std::vector<Request>& requests, const std::vector<Outcome>& got,
                   const std::vector<uint8_t>& allowed = {}) {
  for (size_t i = 0; i < requests.size(); ++i) {
    const Outcome want = Expected(requests[i], allowed);
    EXPECT_TRUE(got[i].error.ok()) << got[i].error;
    EXPECT_EQ(got[i].tokens, want.tokens) << "request " << i;
    ExpectSame(got[i].logprobs, want.logprobs);
    ExpectSame(got[i].prompt_logprobs, want.prompt_logprobs);
  }
}

TEST(WholeSteps, ForwardPassWithoutNumbersEndsItsRequestOnly) {
  Harness h;
  std::vector<Request> requests = {MakeRequest(1, 20, 8), MakeRequest(2, 30, 8), MakeRequest(3, 1, 8)};
  requests[1].prompt[7] = kPoison;
  const std::vector<Outcome> got = h.Run(requests);
  EXPECT_EQ(got[1].finish, FinishReason::kError);
  EXPECT_EQ(got[1].error.code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(got[1].tokens.empty());
  ExpectAsAlone({requests[0], requests[2]}, {got[0], got[2]});
}

TEST(WholeSteps, CancelledRequestGivesItsPagesBackAndDisturbsNobody) {
  Harness h({.limits = {.step_tokens_max = 48, .reuse_prefixes = false}});
  const Request endless = MakeRequest(1, 70, 100000), other = MakeRequest(2, 40, 200);
  ASSERT_TRUE(h.engine().Submit(endless).ok());
  ASSERT_TRUE(h.engine().Submit(other).ok());
  h.WaitFor(endless.key, [](const Outcome& o) { return o.tokens.size() >= 3; });
  h.engine().Cancel(endless.key);
  const Outcome ended =
      h.WaitFor(other.key, [](const Outcome& o) { return o.finish != FinishReason::kNone; });
  ExpectAsAlone({other}, {ended});
  const absl::Time limit = absl::Now() + absl::Seconds(30);
  while (h.engine().status().pages_used > 0 && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(h.engine().status().pages_used, 0);
  EXPECT_EQ(h.engine().status().running, 0);
  h.Stop();
  const Outcome cancelled = h.WaitFor(endless.key, [](const Outcome&) { return true; });
  EXPECT_EQ(cancelled.finish, FinishReason::kNone);
  const std::vector<uint32_t> want = Expected(MakeRequest(1, 70, 64)).tokens;
  for (size_t i = 0; i < std::min(want.size(), cancelled.tokens.size()); ++i) {
    ASSERT_EQ(cancelled.tokens[i], want[i]);
  }
}

TEST(WholeSteps, PreemptedRequestsGoOnWithTheSameText) {
  Harness h({.pages = 7, .limits = {.step_tokens_max = 64, .reuse_prefixes = false}});
  std::vector<Request> requests;
  for (uint64_t id = 1; id <= 4; ++id) requests.push_back(MakeRequest(id, 50, 150));
  ExpectAsAlone(requests, h.Run(requests));
  EXPECT_GT(h.engine().status().preemptions, 0u);
}

TEST(WholeSteps, BatchesOfPromptsInPiecesAndDecodingRowsGiveEachItsOwnText) {
  Harness h;
  std::vector<Request> requests;
  std::mt19937 rng(4);
  for (uint64_t id = 1; id <= 24; ++id) {
    SamplingParams p;
    p.temperature = id % 3 == 0 ? 0 : 0.8f;
    p.top_p = id % 4 == 0 ? 0.9f : 1;
    p.top_k = id % 5 == 0 ? 7 : 0;
    p.seed = id;
    requests.push_back(MakeRequest(id, 1 + rng() % 200, 1 + rng() % 90, p));
  }
  requests[5].prompt = requests[4].prompt;  // shares its pages
  requests[5].prompt.push_back(3);
  ExpectAsAlone(requests, h.Run(requests));
  ExpectAsAlone(requests, [&] {  // again, with the prompts' pages in the cache
    std::vector<Request> again = requests;
    for (Request& request : again) request.key.request += 100;
    return h.Run(again);
  }());
  h.Stop();
  EXPECT_GT(h.seen.mixed_steps, 0);
  EXPECT_GT(h.seen.later_chunks, 0);
  EXPECT_EQ(h.seen.rows_max, 48);
  EXPECT_GT(h.seen.drawn, 1000);
  EXPECT_EQ(h.seen.left, 0);
  EXPECT_TRUE(h.engine().status().connected);
}

TEST(WholeSteps, WhatTheModelCannotDrawIsDrawnFromItsLogits) {
  Harness h;
  std::vector<Request> requests;
  for (uint64_t id = 1; id <= 8; ++id) {
    SamplingParams p;
    p.temperature = 0.7f;
    p.seed = id;
    if (id == 1) p.presence_penalty = 1.5f;
    if (id == 2) p.frequency_penalty = 0.5f;
    if (id == 3) p.repetition_penalty = 1.3f;
    if (id == 4) p.logit_bias = {{7, 6.0f}, {9, -100.0f}};
    if (id == 5) p.want_logprobs = true, p.top_logprobs = 3;
    requests.push_back(MakeRequest(id, 10 + 9 * static_cast<int64_t>(id), 40, p));
  }
  ExpectAsAlone(requests, h.Run(requests));
  h.Stop();
  EXPECT_EQ(h.seen.left, 5 * 40);
  EXPECT_EQ(h.seen.drawn, 3 * 40);
}

TEST(WholeSteps, PromptLogprobsOfEveryTokenInPieces) {
  Harness h;
  SamplingParams p;
  p.temperature = 0;
  p.want_prompt_logprobs = true;
  p.top_prompt_logprobs = 2;
  const std::vector<Request> requests = {MakeRequest(1, 170, 5, p), MakeRequest(2, 33, 20),
                                         MakeRequest(3, 2, 3, p)};
  ExpectAsAlone(requests, h.Run(requests));
}

TEST(WholeSteps, IdsWithoutATokenAreNeverDrawnAndStopTokensEnd) {
  std::vector<uint8_t> allowed(Vocab(), 1);
  for (size_t i = 0; i < allowed.size(); i += 2) allowed[i] = 0;
  Harness h({.allowed = allowed});
  SamplingParams bias;
  bias.logit_bias = {{11, 100.0f}};
  bias.stop_token_ids = {11};
  const std::vector<Request> requests = {MakeRequest(1, 30, 60), MakeRequest(2, 30, 60, bias)};
  const std::vector<Outcome> got = h.Run(requests);
  ExpectAsAlone(requests, got, allowed);
  for (const uint32_t token : got[0].tokens) EXPECT_EQ(token % 2, 1u);
  EXPECT_EQ(got[1].tokens, std::vector<uint32_t>{11});
  EXPECT_EQ(got[1].finish, FinishReason::kStop);
  EXPECT_EQ(got[0].finish, FinishReason::kLength);
}

}  // namespace
}  // namespace minke::attention
