#include "services/gateway/attention_client/attention_pool.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_format.h"
#include "libs/base/log.h"
#include "libs/base/strings.h"
#include "libs/cluster/prefix_hash.h"
#include "libs/rpc/credentials.h"
#include "services/gateway/attention_client/convert.h"
#include "services/gateway/attention_client/session.h"
#include "services/gateway/attention_client/session_health.h"

namespace minke::gateway {
namespace {

namespace v1 = inference::v1;
using Clock = std::chrono::steady_clock;

constexpr char kTag[] = "gateway/attention_client";
// Log-probabilities of a long prompt with alternatives are the largest messages.
constexpr int kMessageBytesMax = 256 << 20;
// How often waiting sequences and channels are looked at when nothing wakes the thread.
constexpr std::chrono::milliseconds kTickMax{50};
// A sequence that was moved and finds the next node's admission queue full tries again after this.
constexpr std::chrono::milliseconds kRefusedPause{200};
constexpr size_t kPrefixesMax = 1 << 22;  // remembered of one node: 64 MiB
// A node may have so many sequences more than twice the idlest one's, and still be preferred for what its
// cache holds.
constexpr int64_t kImbalanceFree = 4;

std::shared_ptr<grpc::Channel> Connect(const std::string& address,
                                       const std::shared_ptr<tls::Identity>& identity) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMessageBytesMax);
  arguments.SetMaxSendMessageSize(kMessageBytesMax);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000);  // how long one attempt may take
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);          // nodes are reached directly
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a new channel is a new connection
  return rpc::SecureChannel(address, identity, arguments).Get();
}

}  // namespace

class AttentionPool::Impl final : public SessionOwner {
 public:
  Impl(AttentionPoolOptions options, GatewayCounters* counters, std::function<void(bool)> on_connected)
      : options_(options),
        counters_(*counters),
        on_connected_(std::move(on_connected)),
        thread_([this] { Maintain(); }) {}
  ~Impl();

  void UpdateNodes(const std::vector<AttentionNode>& nodes);
  uint64_t Start(SequenceSpec spec, std::shared_ptr<SequenceSink> sink);
  void Cancel(uint64_t id);

  void OnMessage(Session* session, v1::AttentionMessage* message) override;
  void OnSessionDone(Session* session, const grpc::Status& status) override;

 private:
  struct Node {
    AttentionNode info;
    std::shared_ptr<grpc::Channel> channel;
    std::unique_ptr<v1::Attention::Stub> stub;
    Session* session = nullptr;  // owns itself; null: none
    bool cancelling = false;     // its session was told to end
    SessionHealth health;        // of its session
    bool silent = false;
    int64_t sequences = 0;
    absl::flat_hash_set<uint64_t> prefixes;  // what its latent cache can reuse
    bool in_view = true;
    Clock::time_point absent_since{};
    Clock::time_point connect_at{};
    std::chrono::milliseconds pause{0};

    bool takes_new() const {
      return session != nullptr && !cancelling && health.open() && !silent && in_view && info.ready &&
             !info.draining;
    }
  };
  struct Sequence {
    SequenceSpec spec;
    std::shared_ptr<SequenceSink> sink;
    uint32_t generation = 0;
    std::vector<uint64_t> prefixes;  // names of the prompt's prefixes, one per whole page
    TokenIds generated;              // what the client has: goes along at a resubmission
    size_t prompt_logprobs = 0;      // delivered
    size_t prompt_logprobs_now = 0;  // received in this generation
    Node* node = nullptr;            // null: waits for one
    Clock::time_point wait_until{};
    Clock::time_point not_before{};  // tries again then
    bool refused = false;            // by a node with a full queue, since it last was aboard one
    int lost_sessions = 0;
    std::vector<uint64_t> left_silent;  // nodes that were silent when it left, and have not been heard since
    uint64_t pages_from = 0;            // node whose latents the next one may take over; 0: none
  };
  // Sinks are called after the lock is released.
  using Deliveries = std::vector<std::pair<std::shared_ptr<SequenceSink>, SequenceEvent>>;

  Node* PickLocked(const std::vector<uint64_t>& prefixes) const;
  void PlaceLocked(uint64_t id, Sequence* sequence, Node* node);
  // Tells the node to forget the sequence.
  void LeaveNodeLocked(uint64_t id, Sequence* sequence);
  void PlaceWaitingLocked(Deliveries* deliveries);
  void MoveFromLeavingLocked();
  void ConnectLocked(Node* node);
  void CheckHealthLocked(Node* node, Clock::time_point now);
  void HeardLocked(Session* session, uint64_t beat);
  void FailLocked(uint64_t id, absl::Status status, Deliveries* deliveries);
  bool TakeEventLocked(Session* session, const v1::Event& proto, SequenceEvent* event,
                       std::shared_ptr<SequenceSink>* sink);
  void TakePrefixesLocked(Session* session, const v1::AttentionMessage& message);
  void Maintain();
  static void Deliver(Deliveries deliveries) {
    for (auto& [sink, event] : deliveries) sink->OnEvent(std::move(event));
  }

  const AttentionPoolOptions options_;
  GatewayCounters& counters_;
  const std::function<void(bool)> on_connected_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::map<uint64_t, std::unique_ptr<Node>> nodes_;  // by node id
  std::unordered_map<uint64_t, Sequence> sequences_;
  std::vector<uint64_t> waiting_;  // sequences without a node, oldest first; some may be gone
  uint64_t next_id_ = 1;
  bool stopping_ = false;
  bool poke_ = false;  // the thread has something to do
  std::thread thread_;
};

AttentionPool::Impl::~Impl() {
  Deliveries deliveries;
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
    for (auto& [id, node] : nodes_) {
      if (node->session != nullptr) node->session->TryCancel();
    }
    // gRPC calls OnDone for every session that was started, soon after a cancel.
    changed_.wait(lock, [this] {
      return std::all_of(nodes_.begin(), nodes_.end(),
                         [](const auto& entry) { return entry.second->session == nullptr; });
    });
    while (!sequences_.empty()) {
      FailLocked(sequences_.begin()->first, absl::UnavailableError("the gateway is shutting down"),
                 &deliveries);
    }
  }
  thread_.join();
  Deliver(std::move(deliveries));
}

void AttentionPool::Impl::UpdateNodes(const std::vector<AttentionNode>& nodes) {
  const std::lock_guard lock(mutex_);
  for (auto& [id, node] : nodes_) {
    const bool was_in_view = std::exchange(node->in_view, false);
    if (was_in_view) node->absent_since = Clock::now();
  }
  for (const AttentionNode& info : nodes) {
    std::unique_ptr<Node>& node = nodes_[info.node_id];
    if (node == nullptr) {
      node = std::make_unique<Node>();
      node->channel = Connect(info.address, options_.identity);
      node->stub = v1::Attention::NewStub(node->channel);
    }
    node->info = info;
    node->in_view = true;
  }
  poke_ = true;
  changed_.notify_all();
}

AttentionPool::Impl::Node* AttentionPool::Impl::PickLocked(const std::vector<uint64_t>& prefixes) const {
  Node* idlest = nullptr;
  Node* nearest = nullptr;  // holds the longest prefix
  int64_t nearest_pages = 0;
  for (const auto& [id, node] : nodes_) {
    if (!node->takes_new()) continue;
    if (idlest == nullptr || node->sequences < idlest->sequences) idlest = node.get();
    const auto miss =
        std::find_if(prefixes.begin(), prefixes.end(),
                     [&held = node->prefixes](uint64_t prefix) { return !held.contains(prefix); });
    const int64_t pages = miss - prefixes.begin();
    if (pages > nearest_pages ||
        (pages == nearest_pages && pages > 0 && node->sequences < nearest->sequences)) {
      nearest = node.get();
      nearest_pages = pages;
    }
  }
  const bool overloaded = nearest != nullptr && nearest->sequences > 2 * idlest->sequences + kImbalanceFree;
  return nearest == nullptr || overloaded ? idlest : nearest;
}

uint64_t AttentionPool::Impl::Start(SequenceSpec spec, std::shared_ptr<SequenceSink> sink) {
  std::vector<uint64_t> prefixes = cluster::PrefixHashes(*spec.prompt);
  const std::lock_guard lock(mutex_);
  const uint64_t id = next_id_++;
  Sequence& sequence = sequences_[id];
  sequence.spec = std::move(spec);
  sequence.sink = std::move(sink);
  sequence.prefixes = std::move(prefixes);
  if (Node* node = PickLocked(sequence.prefixes)) {
    PlaceLocked(id, &sequence, node);
  } else {
    sequence.wait_until = Clock::now() + options_.node_wait_max;
    waiting_.push_back(id);
  }
  return id;
}

void AttentionPool::Impl::PlaceLocked(uint64_t id, Sequence* sequence, Node* node) {
  v1::GatewayMessage message;
  v1::Submit* submit = message.mutable_submit();
  submit->set_request_id(id);
  submit->set_generation(sequence->generation);
  submit->mutable_prompt_token_ids()->Assign(sequence->spec.prompt->begin(), sequence->spec.prompt->end());
  submit->mutable_generated_token_ids()->Assign(sequence->generated.begin(), sequence->generated.end());
  ToProto(sequence->spec.sampling, submit->mutable_sampling());
  if (sequence->prompt_logprobs + 1 >= sequence->spec.prompt->size()) {
    submit->mutable_sampling()->set_want_prompt_logprobs(false);  // the client has them all
  }
  submit->set_waiting_ms_max(options_.waiting_ms_max);
  if (sequence->spec.deadline != Clock::time_point::max()) {
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(sequence->spec.deadline - Clock::now()).count();
    submit->set_deadline_ms(static_cast<uint32_t>(std::clamp<int64_t>(left, 1, UINT32_MAX)));
  }
  submit->set_pages_from(std::exchange(sequence->pages_from, 0));
  submit->set_request_name(sequence->spec.origin.request_id);
  submit->set_traceparent(sequence->spec.origin.traceparent);
  sequence->node = node;
  sequence->prompt_logprobs_now = 0;
  ++node->sequences;
  node->session->Send(std::move(message));
}

void AttentionPool::Impl::LeaveNodeLocked(uint64_t id, Sequence* sequence) {
  Node* node = std::exchange(sequence->node, nullptr);
  --node->sequences;
  if (node->session == nullptr) return;
  v1::GatewayMessage message;
  message.mutable_cancel()->set_request_id(id);
  message.mutable_cancel()->set_generation(sequence->generation);
  node->session->Send(std::move(message));
}

void AttentionPool::Impl::Cancel(uint64_t id) {
  std::shared_ptr<SequenceSink> sink;  // released after the lock
  const std::lock_guard lock(mutex_);
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  Sequence& sequence = found->second;
  if (sequence.node != nullptr) LeaveNodeLocked(id, &sequence);
  sink = std::move(sequence.sink);
  sequences_.erase(found);
}

void AttentionPool::Impl::FailLocked(uint64_t id, absl::Status status, Deliveries* deliveries) {
  const auto found = sequences_.find(id);
  SequenceEvent event;
  event.finish = FinishReason::kError;
  event.error = std::move(status);
  deliveries->emplace_back(std::move(found->second.sink), std::move(event));
  if (found->second.node != nullptr) --found->second.node->sequences;
  sequences_.erase(found);
}

bool AttentionPool::Impl::TakeEventLocked(Session* session, const v1::Event& proto, SequenceEvent* event,
                                          std::shared_ptr<SequenceSink>* sink) {
  const auto found = sequences_.find(proto.request_id());
  if (found == sequences_.end()) return false;  // cancelled meanwhile
  Sequence& sequence = found->second;
  if (sequence.node == nullptr || sequence.node->session != session ||
      sequence.generation != proto.generation())
    return false;
  sequence.node->pause = {};  // this session works
  if (absl::IsResourceExhausted(event->error) && sequence.generation > 0) {
    // It was let in once, and lost its place through no fault of its own.
    const Clock::time_point now = Clock::now();
    if (!std::exchange(sequence.refused, true)) sequence.wait_until = now + options_.node_wait_max;
    sequence.not_before = now + kRefusedPause;
    --sequence.node->sequences;
    sequence.node = nullptr;
    ++sequence.generation;
    waiting_.push_back(proto.request_id());
    return false;
  }
  sequence.refused = false;
  sequence.generated.insert(sequence.generated.end(), event->token_ids.begin(), event->token_ids.end());
  if (!event->prompt_logprobs.empty()) {
    // A resubmission computes the prompt again: what was delivered before is not delivered twice.
    const size_t received = event->prompt_logprobs.size();
    const size_t known =
        std::min(received,
                 sequence.prompt_logprobs - std::min(sequence.prompt_logprobs, sequence.prompt_logprobs_now));
    event->prompt_logprobs.erase(event->prompt_logprobs.begin(),
                                 event->prompt_logprobs.begin() + static_cast<std::ptrdiff_t>(known));
    sequence.prompt_logprobs_now += received;
    sequence.prompt_logprobs = std::max(sequence.prompt_logprobs, sequence.prompt_logprobs_now);
  }
  if (sequence.generation > 0) event->cached_prompt_tokens = 0;  // counted the first time
  if (event->finish == FinishReason::kNone) {
    *sink = sequence.sink;
    return true;
  }
  event->moves = sequence.generation;
  *sink = std::move(sequence.sink);
  --sequence.node->sequences;
  sequences_.erase(found);
  return true;
}

void AttentionPool::Impl::TakePrefixesLocked(Session* session, const v1::AttentionMessage& message) {
  if (message.prefixes_size() == 0 || message.prefixes_size() != message.prefix_gained_size()) return;
  const auto node = std::find_if(nodes_.begin(), nodes_.end(),
                                 [&](const auto& entry) { return entry.second->session == session; });
  if (node == nodes_.end()) return;
  absl::flat_hash_set<uint64_t>& held = node->second->prefixes;
  for (int i = 0; i < message.prefixes_size(); ++i) {
    if (!message.prefix_gained(i)) {
      held.erase(message.prefixes(i));
    } else if (held.size() < kPrefixesMax) {
      held.insert(message.prefixes(i));
    }
  }
}

void AttentionPool::Impl::OnMessage(Session* session, v1::AttentionMessage* message) {
  std::vector<SequenceEvent> events;
  events.reserve(static_cast<size_t>(message->events_size()));
  for (v1::Event& proto : *message->mutable_events()) events.push_back(FromProto(&proto));
  Deliveries deliveries;
  deliveries.reserve(events.size());
  {
    const std::lock_guard lock(mutex_);
    HeardLocked(session, message->beat());
    TakePrefixesLocked(session, *message);
    for (size_t i = 0; i < events.size(); ++i) {
      std::shared_ptr<SequenceSink> sink;
      if (TakeEventLocked(session, message->events(static_cast<int>(i)), &events[i], &sink)) {
        deliveries.emplace_back(std::move(sink), std::move(events[i]));
      }
    }
  }
  Deliver(std::move(deliveries));
}

void AttentionPool::Impl::OnSessionDone(Session* session, const grpc::Status& status) {
  Deliveries deliveries;
  {
    const std::lock_guard lock(mutex_);
    Node* node = nullptr;
    for (auto& [id, candidate] : nodes_) {
      if (candidate->session == session) node = candidate.get();
    }
    node->session = nullptr;
    node->prefixes.clear();  // a new session is told all again
    node->cancelling = false;
    // An established connection would go on waiting for whoever was cut off.
    if (std::exchange(node->silent, false) || !node->health.open()) {
      node->channel = Connect(node->info.address, options_.identity);
      node->stub = v1::Attention::NewStub(node->channel);
    }
    node->pause = std::min(std::max(node->pause * 2, options_.reconnect_min), options_.reconnect_max);
    node->connect_at = Clock::now() + node->pause;
    size_t moved = 0;
    std::vector<uint64_t> quarantined;
    if (!stopping_) {
      for (auto& [id, sequence] : sequences_) {
        if (std::erase(sequence.left_silent, node->info.node_id) > 0) ++sequence.lost_sessions;
        if (sequence.node != node) continue;
        sequence.node = nullptr;
        ++sequence.generation;  // late events of the old one are dropped
        // A node that ran out of time to drain left in order: it was not this request that ended it.
        if (!node->info.draining && ++sequence.lost_sessions >= options_.lost_sessions_max) {
          quarantined.push_back(id);
          continue;
        }
        sequence.wait_until = Clock::now() + options_.node_wait_max;
        sequence.not_before = {};
        waiting_.push_back(id);
        ++moved;
      }
      node->sequences = 0;
      log::Warning(kTag,
                   absl::StrFormat("node=%016x address=%s session lost (%s), sequences to move: %d",
                                   node->info.node_id, node->info.address, status.error_message(), moved));
    }
    for (const uint64_t id : quarantined) {
      FailLocked(id,
                 absl::InternalError(StrCat("the request was aboard ", options_.lost_sessions_max,
                                            " attention nodes that failed, and is not given to another one")),
                 &deliveries);
    }
    counters_.resubmissions.fetch_add(moved);
    if (!stopping_) PlaceWaitingLocked(&deliveries);
    poke_ = true;
    changed_.notify_all();
  }
  Deliver(std::move(deliveries));
}

void AttentionPool::Impl::PlaceWaitingLocked(Deliveries* deliveries) {
  std::vector<uint64_t> still_waiting;
  const Clock::time_point now = Clock::now();
  for (const uint64_t id : waiting_) {
    const auto found = sequences_.find(id);
    if (found == sequences_.end() || found->second.node != nullptr) continue;
    Node* node = now < found->second.not_before ? nullptr : PickLocked(found->second.prefixes);
    if (now >= found->second.spec.deadline) {
      FailLocked(
          id,
          absl::DeadlineExceededError("the request's deadline passed while it waited for an attention node"),
          deliveries);
    } else if (node != nullptr && (now < found->second.wait_until || !found->second.refused)) {
      PlaceLocked(id, &found->second, node);
    } else if (now >= found->second.wait_until) {
      FailLocked(id, absl::UnavailableError("no attention node can take the request"), deliveries);
    } else {
      still_waiting.push_back(id);
    }
  }
  waiting_ = std::move(still_waiting);
}

// What the old node generates from here on is dropped, and generated again by the next one: the draw is a
// function of seed and position. Where there is no other node the sequences stay where they are: a draining
// node finishes them, a silent one may speak again.
void AttentionPool::Impl::MoveFromLeavingLocked() {
  const auto leaving = [](const Node& node) { return node.info.draining || node.silent; };
  if (std::none_of(nodes_.begin(), nodes_.end(),
                   [&](const auto& entry) { return leaving(*entry.second) && entry.second->sequences > 0; }))
    return;
  size_t migrated = 0, resubmitted = 0;
  for (auto& [id, sequence] : sequences_) {
    if (sequence.node == nullptr || !leaving(*sequence.node)) continue;
    Node* next = PickLocked(sequence.prefixes);
    if (next == nullptr) break;
    const uint64_t from = sequence.node->info.node_id;
    if (sequence.node->silent) {
      sequence.left_silent.push_back(from);
      ++resubmitted;
      counters_.resubmissions.fetch_add(1);
    } else {
      sequence.pages_from = from;
      ++migrated;
      counters_.migrations.fetch_add(1);
    }
    LeaveNodeLocked(id, &sequence);
    ++sequence.generation;  // late events of the old one are dropped
    PlaceLocked(id, &sequence, next);
  }
  if (migrated + resubmitted == 0) return;
  log::Info(kTag, StrCat("sequences moved away from draining nodes: ", migrated,
                         ", from silent ones: ", resubmitted));
}

void AttentionPool::Impl::HeardLocked(Session* session, uint64_t beat) {
  const auto found = std::find_if(nodes_.begin(), nodes_.end(),
                                  [&](const auto& entry) { return entry.second->session == session; });
  if (found == nodes_.end()) return;
  Node& node = *found->second;
  const bool was_open = node.health.open();
  node.health.Heard(Clock::now(), beat);
  if (std::exchange(node.silent, false)) {
    for (auto& [id, sequence] : sequences_) std::erase(sequence.left_silent, node.info.node_id);
    log::Info(kTag,
              absl::StrFormat("node=%016x address=%s speaks again", node.info.node_id, node.info.address));
  } else if (was_open == node.health.open()) {
    return;
  }
  poke_ = true;  // it takes sequences now
  changed_.notify_all();
}

void AttentionPool::Impl::CheckHealthLocked(Node* node, Clock::time_point now) {
  if (node->session == nullptr || node->cancelling) return;
  if (const uint64_t beat = node->health.NextBeat(now)) {
    v1::GatewayMessage message;
    message.set_beat(beat);
    node->session->Send(std::move(message));
  }
  if (!node->health.silent(now)) return;
  if (!std::exchange(node->silent, true)) {
    log::Warning(kTag, absl::StrFormat("node=%016x address=%s silent for two heartbeats, sequences: %d",
                                       node->info.node_id, node->info.address, node->sequences));
  }
  if (node->health.silence(now) < options_.absent_grace) return;
  node->cancelling = true;
  node->session->TryCancel();  // OnSessionDone moves its sequences
}

void AttentionPool::Impl::ConnectLocked(Node* node) {
  if (node->session != nullptr || !node->in_view || Clock::now() < node->connect_at) return;
  if (node->channel->GetState(/*try_to_connect=*/true) != GRPC_CHANNEL_READY) return;
  node->session = new Session(this, node->stub.get());  // deletes itself
  node->health = SessionHealth(options_.heartbeat, Clock::now());
  node->session->Start();
  log::Info(kTag,
            absl::StrFormat("node=%016x address=%s session opened", node->info.node_id, node->info.address));
}

void AttentionPool::Impl::Maintain() {
  std::unique_lock lock(mutex_);
  bool was_connected = false;
  const auto tick = std::min(kTickMax, std::max(options_.heartbeat / 4, std::chrono::milliseconds(1)));
  Clock::time_point last = Clock::now();
  while (!stopping_) {
    Deliveries deliveries;
    const Clock::time_point now = Clock::now();
    const bool was_frozen = now - std::exchange(last, now) > options_.heartbeat;  // this process
    for (auto entry = nodes_.begin(); entry != nodes_.end();) {
      Node& node = *entry->second;
      if (was_frozen) node.health.Excuse(now);
      ConnectLocked(&node);
      CheckHealthLocked(&node, now);
      const bool gone = !node.in_view && now - node.absent_since >= options_.absent_grace;
      if (gone && node.session != nullptr && !node.cancelling) {
        node.cancelling = true;
        node.session->TryCancel();  // OnSessionDone moves its sequences
      }
      entry = gone && node.session == nullptr ? nodes_.erase(entry) : std::next(entry);
    }
    PlaceWaitingLocked(&deliveries);
    MoveFromLeavingLocked();
    const bool is_connected = PickLocked({}) != nullptr;
    const bool flipped = std::exchange(was_connected, is_connected) != is_connected;
    poke_ = false;
    lock.unlock();
    Deliver(std::move(deliveries));
    if (flipped) on_connected_(is_connected);
    lock.lock();
    changed_.wait_for(lock, tick, [this] { return stopping_ || poke_; });
  }
}

AttentionPool::AttentionPool(AttentionPoolOptions options, GatewayCounters* counters,
                             std::function<void(bool)> on_connected)
    : impl_(std::make_unique<Impl>(options, counters, std::move(on_connected))) {}
AttentionPool::~AttentionPool() = default;
void AttentionPool::UpdateNodes(const std::vector<AttentionNode>& nodes) { impl_->UpdateNodes(nodes); }
uint64_t AttentionPool::Start(SequenceSpec spec, std::shared_ptr<SequenceSink> sink) {
  return impl_->Start(std::move(spec), std::move(sink));
}
void AttentionPool::Cancel(uint64_t sequence) { impl_->Cancel(sequence); }

}  // namespace minke::gateway
