// Two or three exchanges over the inproc transport, with memories whose bytes are a function of the tokens a
// page holds: whatever a fetch publishes can be checked.
#include "services/attention/latent_cache/page_exchange.h"

#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "libs/transport/faulty/faulty.h"
#include "libs/transport/inproc/inproc.h"

namespace minke::attention {
namespace {

constexpr int64_t kTokens = kernels::kPageTokens;
constexpr int32_t kLayers = 5;
constexpr int64_t kLayerBytes = 100 * 1024;  // two layers to a transfer, and one left over

class FakeMemory final : public PageMemory {
 public:
  explicit FakeMemory(int64_t pages, int64_t layer_bytes)
      : layer_bytes_(layer_bytes), bytes_(pages * kLayers * layer_bytes) {}
  int32_t page_layers() const override { return kLayers; }
  int64_t page_layer_bytes() const override { return layer_bytes_; }
  void ReadPage(int32_t layer, uint32_t page, std::byte* latents) override {
    std::memcpy(latents, At(layer, page), layer_bytes_);
    read_ += layer_bytes_;
  }
  void WritePage(int32_t layer, uint32_t page, const std::byte* latents) override {
    std::memcpy(At(layer, page), latents, layer_bytes_);
    written_ += layer_bytes_;
  }
  std::byte* At(int32_t layer, uint32_t page) {
    return bytes_.data() + (page * kLayers + layer) * layer_bytes_;
  }
  int64_t TakeRead() { return std::exchange(read_, 0); }
  int64_t TakeWritten() { return std::exchange(written_, 0); }

 private:
  const int64_t layer_bytes_;
  std::vector<std::byte> bytes_;
  int64_t read_ = 0, written_ = 0;
};

// What a layer of the page after `prefix` tokens holds.
std::byte ContentOf(std::span<const uint32_t> prefix, int32_t layer) {
  uint32_t hash = static_cast<uint32_t>(layer) + 17;
  for (const uint32_t token : prefix) hash = hash * 31 + token;
  return static_cast<std::byte>(hash >> 8);
}

std::vector<uint32_t> RandomTokens(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint32_t> tokens(count);
  for (uint32_t& token : tokens) token = random() % 1000;
  return tokens;
}

struct NodeOptions {
  int64_t pages = 64;
  PageExchangeOptions exchange;
  std::optional<transport::FaultOptions> faults;
  int64_t layer_bytes = kLayerBytes;
};

class Node {
 public:
  Node(transport::InprocHub& hub, uint64_t id, NodeOptions options = {})
      : transport_(Make(hub, id, options)),
        memory(options.pages, options.layer_bytes),
        pool(options.pages),
        exchange(options.exchange, memory, pool, *transport_),
        options_(options) {}

  NodeId id() const { return transport_->self(); }

  // A sequence's whole pages are here, published.
  void Hold(std::span<const uint32_t> tokens) {
    std::vector<uint32_t> pages;
    Prefix prefix;
    for (size_t end = kTokens; end <= tokens.size(); end += kTokens) {
      pages.push_back(pool.Take().value());
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        std::memset(memory.At(layer, pages.back()), static_cast<int>(ContentOf(tokens.first(end), layer)),
                    options_.layer_bytes);
      }
      prefix = pool.Publish(pages.back(), prefix, tokens.subspan(end - kTokens, kTokens));
    }
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) pool.Release(*page);
  }

  // How many pages of it are here; every byte of them is checked.
  int64_t Held(std::span<const uint32_t> tokens) {
    Prefix prefix;
    const std::vector<uint32_t> pages = pool.Match(tokens, prefix);
    for (size_t i = 0; i < pages.size(); ++i) {
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        const std::byte* latents = memory.At(layer, pages[i]);
        const std::byte expected = ContentOf(tokens.first((i + 1) * kTokens), layer);
        EXPECT_TRUE(
            std::all_of(latents, latents + options_.layer_bytes, [&](std::byte b) { return b == expected; }))
            << "page " << i << " layer " << layer;
      }
    }
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) pool.Release(*page);
    return std::ssize(pages);
  }

  void Knows(const Node& other) {
    nodes_[other.id()] = other.transport_->address();
    exchange.SetNodes(nodes_);
  }

  void Fetch(const Node& giver, std::vector<uint32_t> prompt, uint64_t request = 1,
             absl::Time until = absl::InfiniteFuture()) {
    Request made;
    made.key = {7, request, 1};
    made.generated.assign(prompt.end() - 1, prompt.end());
    prompt.pop_back();
    made.prompt = std::move(prompt);
    made.pages_from = giver.id();
    made.waiting_until = until;
    exchange.Fetch(std::move(made));
  }

  // One turn of an engine.
  void Turn(int64_t reserved = 0) {
    if (frozen) return;
    transport_->Poll([&](transport::Event& event) {
      if (event.kind == transport::Event::Kind::kFrame) exchange.OnFrame(event.peer, event.frame);
      if (event.kind == transport::Event::Kind::kPeerUp) exchange.OnPeerUp(event.peer);
      if (event.kind == transport::Event::Kind::kPeerLost) exchange.OnPeerLost(event.peer);
    });
    for (Request& request : exchange.Tick(absl::Now(), reserved)) over.push_back(std::move(request));
    for (const auto& [peer, address] : exchange.WantedPeers()) (void)transport_->Connect(peer, address);
  }
  void Die() { transport_.reset(); }

 private:
  static std::unique_ptr<transport::Transport> Make(transport::InprocHub& hub, uint64_t id,
                                                    const NodeOptions& options) {
    auto inner = transport::CreateInproc(hub, {.node_id = NodeId{id}, .cluster_secret = "test"});
    if (!options.faults) return inner;
    return transport::CreateFaulty(std::move(inner), *options.faults);
  }
  std::unique_ptr<transport::Transport> transport_;

 public:
  FakeMemory memory;
  PagePool pool;
  PageExchange exchange;
  std::vector<Request> over;
  bool frozen = false;

 private:
  const NodeOptions options_;
  std::map<NodeId, std::string> nodes_;
};

bool Pump(std::initializer_list<Node*> nodes, const std::function<bool()>& done) {
  const absl::Time limit = absl::Now() + absl::Seconds(20);
  while (!done()) {
    if (absl::Now() > limit) return false;
    for (Node* node : nodes) node->Turn();
    std::this_thread::yield();
  }
  return true;
}

// Both ends have let go of everything.
void ExpectIdle(std::initializer_list<Node*> nodes) {
  EXPECT_TRUE(Pump(nodes, [&] {
    return std::all_of(nodes.begin(), nodes.end(), [](Node* node) { return node->exchange.Idle(); });
  }));
  for (Node* node : nodes) EXPECT_EQ(node->pool.used(), 0);
}

TEST(PageExchange, RaggedPrefixesMoveWithoutTheirLastToken) {
  transport::InprocHub hub;
  Node from(hub, 1, {.pages = 200}), to(hub, 2, {.pages = 200});
  to.Knows(from);
  uint64_t fetched = 0, request = 0;
  for (const int64_t length : {1, 64, 65, 66, 128, 129, 700, 1281}) {
    const std::vector<uint32_t> tokens = RandomTokens(length, static_cast<uint32_t>(length));
    from.Hold(tokens);
    to.Fetch(from, tokens.size() > 1 ? tokens : std::vector<uint32_t>{tokens[0], 1}, ++request);
    ASSERT_TRUE(Pump({&from, &to}, [&] { return to.over.size() == request; }));
    EXPECT_EQ(to.over.back().key.request, request);
    const int64_t pages = (length - 1) / kTokens;  // the last token is computed in any case
    EXPECT_EQ(to.Held(tokens), pages) << length;
    fetched += static_cast<uint64_t>(pages);
    ExpectIdle({&from, &to});
  }
  EXPECT_EQ(to.exchange.counters().pages_fetched, fetched);
  EXPECT_EQ(from.exchange.counters().pages_given, fetched);
  EXPECT_EQ(to.exchange.counters().fetches_failed, 0u);
  EXPECT_EQ(to.exchange.counters().bad_frames + from.exchange.counters().bad_frames, 0u);
}

TEST(PageExchange, OnlyWhatIsNotThereMoves) {
  transport::InprocHub hub;
  Node from(hub, 1), to(hub, 2);
  to.Knows(from);
  const std::vector<uint32_t> tokens = RandomTokens(10 * kTokens + 5, 3);
  from.Hold(tokens);
  to.Hold(std::span(tokens).first(4 * kTokens));
  to.Fetch(from, tokens);
  ASSERT_TRUE(Pump({&from, &to}, [&] { return to.over.size() == 1; }));
  EXPECT_EQ(to.Held(tokens), 10);
  EXPECT_EQ(to.exchange.counters().pages_fetched, 6u);
  EXPECT_EQ(from.exchange.counters().pages_given, 6u);
  to.Fetch(from, tokens, 2);  // now all is there
  to.Turn();
  EXPECT_EQ(to.over.size(), 2u);
  EXPECT_EQ(to.exchange.counters().fetches_failed, 0u);
  ExpectIdle({&from, &to});
}

TEST(PageExchange, TurnsAreBounded) {
  transport::InprocHub hub;
  const PageExchangeOptions exchange{.turn_bytes = 300 * 1024};
  Node from(hub, 1, {.exchange = exchange}), to(hub, 2, {.exchange = exchange});
  to.Knows(from);
  const std::vector<uint32_t> tokens = RandomTokens(20 * kTokens + 1, 3);
  from.Hold(tokens);
  to.Fetch(from, tokens);
  const int64_t turn_max = exchange.turn_bytes + wire::kPayloadBytesMax;  // a slice may cross the limit
  ASSERT_TRUE(Pump({&from, &to}, [&] {
    EXPECT_LE(from.memory.TakeRead(), turn_max);
    EXPECT_LE(to.memory.TakeWritten(), turn_max);
    return to.over.size() == 1;
  }));
  EXPECT_EQ(to.Held(tokens), 20);
}

TEST(PageExchange, ManySequencesShareTheTurns) {
  transport::InprocHub hub;
  Node from(hub, 1, {.pages = 300}), one(hub, 2, {.pages = 200}), other(hub, 3, {.pages = 200});
  one.Knows(from);
  other.Knows(from);
  std::vector<std::vector<uint32_t>> sequences;
  for (uint32_t i = 0; i < 20; ++i) {
    sequences.push_back(RandomTokens(i * 50 + 70, i));
    from.Hold(sequences.back());
    (i % 2 == 0 ? one : other).Fetch(from, sequences.back(), i);
  }
  ASSERT_TRUE(Pump({&from, &one, &other}, [&] { return one.over.size() + other.over.size() == 20; }));
  for (uint32_t i = 0; i < 20; ++i) {
    EXPECT_EQ((i % 2 == 0 ? one : other).Held(sequences[i]), (std::ssize(sequences[i]) - 1) / kTokens);
  }
  ExpectIdle({&from, &one, &other});
}

// Whatever comes, comes right; and the request is always handed over.
TEST(PageExchange, LostRepeatedAndReorderedFrames) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    transport::InprocHub hub;
    transport::FaultOptions faults{.seed = seed,
                                   .drop_probability = seed % 3 == 0 ? 0.03 : 0,
                                   .duplicate_probability = 0.2,
                                   .delay_probability = 0.2,
                                   .delay_max = absl::Milliseconds(5),
                                   .reorder_probability = 0.4};
    // A loaded machine stalls what is not lost.
    const PageExchangeOptions exchange{
        .fetch_stall = absl::Milliseconds(faults.drop_probability == 0 ? 5000 : 100),
        .give_stall = absl::Milliseconds(200)};
    Node from(hub, 1, {.exchange = exchange, .faults = faults});
    faults.seed += 100;
    Node to(hub, 2, {.exchange = exchange, .faults = faults});
    to.Knows(from);
    const std::vector<uint32_t> tokens = RandomTokens(30 * kTokens + 9, static_cast<uint32_t>(seed));
    from.Hold(tokens);
    to.Fetch(from, tokens);
    ASSERT_TRUE(Pump({&from, &to}, [&] { return to.over.size() == 1; })) << "seed " << seed;
    const int64_t held = to.Held(tokens);
    EXPECT_EQ(to.exchange.counters().pages_fetched, static_cast<uint64_t>(held));
    if (faults.drop_probability == 0) {
      EXPECT_EQ(held, 30) << "seed " << seed;
      EXPECT_EQ(to.exchange.counters().fetches_failed, 0u);
    } else {
      EXPECT_EQ(to.exchange.counters().fetches_failed, held < 30 ? 1u : 0u);
    }
    ExpectIdle({&from, &to});
  }
}

TEST(PageExchange, GiverWithoutThePages) {
  transport::InprocHub hub;
  Node from(hub, 1), to(hub, 2);
  to.Knows(from);
  const std::vector<uint32_t> tokens = RandomTokens(300, 1);
  to.Fetch(from, tokens);
  const absl::Time begin = absl::Now();
  ASSERT_TRUE(Pump({&from, &to}, [&] { return to.over.size() == 1; }));
  EXPECT_LT(absl::Now() - begin, absl::Milliseconds(900));  // it says so; nobody waits in vain
  EXPECT_EQ(to.Held(tokens), 0);
  EXPECT_EQ(to.exchange.counters().fetches_failed, 1u);
  ExpectIdle({&from, &to});
}

TEST(PageExchange, GiverWithABeginningGivesThat) {
  transport::InprocHub hub;
  Node from(hub, 1), to(hub, 2);
  to.Knows(from);
  const std::vector<uint32_t> tokens = RandomTokens(500, 1);
  from.Hold(std::span(tokens).first(2 * kTokens));
  to.Fetch(from, tokens);
  ASSERT_TRUE(Pump({&from, &to}, [&] { return to.over.size() == 1; }));
  EXPECT_EQ(to.Held(tokens), 2);
  ExpectIdle({&from, &to});
}

TEST(PageExchange, FewFreePagesTakeTheBeginning) {
  transport::InprocHub hub;
  Node from(hub, 1), to(hub, 2, {.pages = 6});
  to.Knows(from);
  const std::vector<uint32_t> tokens = RandomTokens(20 * kTokens + 1, 1);
  from.Hold(tokens);
  const uint32_t running = to.pool.Take().value();  // some sequence's, which stays
  to.Fetch(from, tokens);
  ASSERT_TRUE(Pump({&from}, [&] {
    to.Turn(/*reserved=*/2);
    return to.over.size() == 1;
  }));
  EXPECT_EQ(to.Held(tokens), 3);
  EXPECT_EQ(to.exchange.counters().fetches_failed, 1u);
  to.pool.Release(running);
  ExpectIdle({&from, &to});  // the giver was told to stop
}

TEST(PageExchange, UnknownNodeAndReuseSwitchedOffHandTheRequestOverAtOnce) {
  transport::InprocHub hub;
  Node from(hub, 1), to(hub, 2), off(hub, 3, {.exchange = {.enabled = false}});
  const std::vector<uint32_t> tokens = RandomTokens(300, 1);
  from.Hold(tokens);
  to.Fetch(from, tokens);  // nobody told it where that is
  to.Turn();
  EXPECT_EQ(to.over.size(), 1u);
  EXPECT_EQ(to.exchange.counters().fetches_failed, 1u);
  off.Knows(from);
  off.Fetch(from, tokens);
  off.Turn();
  EXPECT_EQ(off.over.size(), 1u);
  EXPECT_EQ(off.exchange.counters().fetches_failed, 0u);
  to.Knows(off);  // and a node without reuse gives nothing
  to.Fetch(off, tokens, 2);
  ASSERT_TRUE(Pump({&off, &to}, [&] { return to.over.size() == 2; }));
  ExpectIdle({&to, &off});
}

TEST(PageExchange, PagesLargerThanAPayloadStay) {
  transport::InprocHub hub;
  const int64_t bytes = wire::kPayloadBytesMax + 64;
  Node from(hub, 1, {.pages = 8, .layer_bytes = bytes}), to(hub, 2, {.pages = 8, .layer_bytes = bytes});
  to.Knows(from);
  const std::vector<uint32_t> tokens = RandomTokens(300, 1);
  from.Hold(tokens);
  to.Fetch(from, tokens);
  to.Turn();
  EXPECT_EQ(to.over.size(), 1u);
}

TEST(PageExchange, FrozenGiverHoldsNobodyUpForLong) {
  transport::InprocHub hub;
  const PageExchangeOptions exchange{.turn_bytes = 300 * 1024, .fetch_stall = absl::Milliseconds(150)};
  Node from(hub, 1, {.exchange = exchange}), to(hub, 2, {.exchange = exchange});
  to.Knows(from);
  std::vector<std::vector<uint32_t>> sequences;
  for (uint32_t i = 0; i < 10; ++i) {  // more than are fetched at once
    sequences.push_back(RandomTokens(5 * kTokens + 1, i));
    from.Hold(sequences.back());
    to.Fetch(from, sequences.back(), i);
  }
  ASSERT_TRUE(Pump({&from, &to}, [&] { return to.exchange.counters().pages_fetched > 0; }));
  from.frozen = true;
  const absl::Time begin = absl::Now();
  ASSERT_TRUE(Pump({&from, &to}, [&] { return to.over.size() == 10; }));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(2));  // not 150 ms for each four of them
  int64_t held = 0;
  for (const auto& tokens : sequences) held += to.Held(tokens);
  EXPECT_GT(held, 0);
  EXPECT_EQ(to.pool.used(), 0);
  EXPECT_GT(to.exchange.counters().fetches_failed, 0u);
}

TEST(PageExchange, LostGiverAndLostFetcher) {
  transport::InprocHub hub;
  const PageExchangeOptions exchange{.turn_bytes = 300 * 1024, .fetch_stall = absl::Seconds(10)};
  const std::vector<uint32_t> tokens = RandomTokens(40 * kTokens + 1, 1);
  {
    Node from(hub, 1, {.exchange = exchange}), to(hub, 2, {.exchange = exchange});
    to.Knows(from);
    from.Hold(tokens);
    to.Fetch(from, tokens);
    ASSERT_TRUE(Pump({&from, &to}, [&] { return to.exchange.counters().pages_fetched >= 3; }));
    from.Die();
    ASSERT_TRUE(Pump({&to}, [&] { return to.over.size() == 1; }));
    EXPECT_GE(to.Held(tokens), 3);
    EXPECT_LT(to.Held(tokens), 40);
    EXPECT_EQ(to.pool.used(), 0);
  }
  Node from(hub, 3, {.exchange = exchange}), to(hub, 4, {.exchange = exchange});
  to.Knows(from);
  from.Hold(tokens);
  to.Fetch(from, tokens);
  ASSERT_TRUE(Pump({&from, &to}, [&] { return from.exchange.counters().pages_given >= 3; }));
  to.Die();
  ASSERT_TRUE(Pump({&from}, [&] { return from.exchange.Idle(); }));
  EXPECT_EQ(from.pool.used(), 0);
}

TEST(PageExchange, CancelledAndLateFetchesEnd) {
  transport::InprocHub hub;
  const PageExchangeOptions exchange{.turn_bytes = 300 * 1024, .fetches_max = 2};
  Node from(hub, 1, {.exchange = exchange}), to(hub, 2, {.exchange = exchange});
  to.Knows(from);
  const std::vector<uint32_t> tokens = RandomTokens(40 * kTokens + 1, 1);
  from.Hold(tokens);
  to.Fetch(from, tokens, 1);
  to.Fetch(from, tokens, 2, absl::Now() + absl::Milliseconds(300));
  to.Fetch(from, tokens, 3);  // waits for a place
  ASSERT_TRUE(Pump({&from, &to}, [&] { return to.exchange.counters().pages_fetched >= 1; }));
  to.exchange.Cancel({7, 1, 1});
  EXPECT_EQ(to.exchange.fetching(), 2);
  to.exchange.Cancel({7, 9, 1});  // unknown
  absl::SleepFor(absl::Milliseconds(310));
  ASSERT_TRUE(Pump({&to}, [&] { return !to.over.empty(); }));
  EXPECT_EQ(to.over.front().key.request, 2u);  // the scheduler says that it is too late
  to.exchange.CancelSession(7);
  EXPECT_EQ(to.exchange.fetching(), 0);
  EXPECT_EQ(to.pool.used(), 0);
  ExpectIdle({&from, &to});
}

TEST(PageExchange, MalformedFramesAreCounted) {
  transport::InprocHub hub;
  Node node(hub, 1);
  transport::FramePool frames;
  const auto send = [&](wire::Kind kind, uint32_t bytes, uint32_t rows, uint32_t pairs, uint32_t row_begin,
                        uint16_t layer) {
    transport::FrameRef frame = frames.Allocate(bytes);
    std::memset(frame.payload(), 0, bytes);
    frame.header().kind = kind;
    frame.header().rows = rows;
    frame.header().pairs = pairs;
    frame.header().row_begin = row_begin;
    frame.header().layer = layer;
    const uint64_t before = node.exchange.counters().bad_frames;
    node.exchange.OnFrame(NodeId{9}, frame);
    return node.exchange.counters().bad_frames == before + 1;
  };
  using wire::Kind;
  EXPECT_TRUE(send(Kind::kPageRequest, 4 * 63, 63, 0, 0, 0));             // no whole page
  EXPECT_TRUE(send(Kind::kPageRequest, 4 * 64, 128, 0, 0, 0));            // too short
  EXPECT_TRUE(send(Kind::kPageRequest, 4 * 64, 64, 0, 1, 0));             // first beyond the end
  EXPECT_TRUE(send(Kind::kPageRequest, 4 * 64, 64, 1, 0, 0));             // unused field
  EXPECT_TRUE(send(Kind::kPageRequest, 0, 1 << 31, 0, 0, 0));             // more than there may be
  EXPECT_TRUE(send(Kind::kPageTransfer, kLayerBytes, 1, 1, 1, 0));        // page beyond the end
  EXPECT_TRUE(send(Kind::kPageTransfer, kLayerBytes, 1, 1025, 0, 0));     // more than there may be
  EXPECT_TRUE(send(Kind::kPageTransfer, kLayerBytes, 1, 1, 0, kLayers));  // no such layer
  EXPECT_TRUE(send(Kind::kPageTransfer, kLayerBytes, 2, 1, 0, 0));        // too short
  EXPECT_TRUE(send(Kind::kPageTransfer, 0, 0, 1, 0, 0));                  // nothing
  EXPECT_TRUE(send(Kind::kPageTransfer, kLayerBytes, 0xffffffff, 1, 0, 1));
  EXPECT_TRUE(send(Kind::kPageEnd, 1, 0, 0, 0, 0));
  EXPECT_TRUE(send(Kind::kPageEnd, 0, 0, 1025, 0, 0));
  EXPECT_TRUE(send(Kind::kPageAck, 0, 1, 0, 0, 0));
  // Strangers: nothing is known of them, and nothing happens.
  EXPECT_FALSE(send(Kind::kPageTransfer, kLayerBytes, 1, 1, 0, 0));
  EXPECT_FALSE(send(Kind::kPageEnd, 0, 0, 3, 0, 0));
  EXPECT_FALSE(send(Kind::kPageAck, 0, 0, 0, 12, 0));
  EXPECT_FALSE(send(Kind::kPageRequest, 0, 0, 0, 0, 0));
  EXPECT_TRUE(node.exchange.Idle());
}

}  // namespace
}  // namespace minke::attention
