#include "services/gateway/attention_client/status_poller.h"

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "libs/rpc/credentials.h"
#include "proto/inference/inference.grpc.pb.h"

namespace minke::gateway {

namespace v1 = inference::v1;
using Clock = std::chrono::steady_clock;

class StatusPoller::Impl : public std::enable_shared_from_this<Impl> {
 public:
  Impl(std::shared_ptr<tls::Identity> identity, std::chrono::milliseconds period)
      : identity_(std::move(identity)), period_(period) {}

  void UpdateNodes(const std::vector<AttentionNode>& nodes) {
    const std::lock_guard lock(mutex_);
    std::map<uint64_t, Node> next;
    for (const AttentionNode& info : nodes) {
      Node& node = next[info.node_id];
      if (const auto old = nodes_.find(info.node_id); old != nodes_.end()) {
        node = std::move(old->second);
        nodes_.erase(old);
      } else {
        grpc::ChannelArguments arguments;
        arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // nodes are reached directly
        node.address = std::make_unique<rpc::SecureChannel>(info.address, identity_, arguments);
      }
    }
    for (const auto& [id, gone] : nodes_) AddCounters(gone.last, left_);
    nodes_ = std::move(next);
  }

  EngineTotals totals() const {
    const std::lock_guard lock(mutex_);
    EngineTotals totals = left_;
    for (const auto& [id, node] : nodes_) {
      AddCounters(node.last, totals);
      if (node.answered == Clock::time_point() || Clock::now() - node.answered > 3 * period_) continue;
      ++totals.nodes;
      totals.running += node.last.running_sequences();
      totals.waiting += node.last.waiting_sequences();
      totals.pages += node.last.cache_pages_total();
      totals.pages_used += node.last.cache_pages_used();
    }
    return totals;
  }

  void Run() {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      for (auto& [id, node] : nodes_) {
        if (!std::exchange(node.asked, true)) Ask(id, node);
      }
      changed_.wait_for(lock, period_, [this] { return stopping_; });
    }
  }

  void Stop() {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }

 private:
  struct Node {
    std::unique_ptr<rpc::SecureChannel> address;
    std::shared_ptr<grpc::Channel> channel;     // of `stub`
    std::shared_ptr<v1::Attention::Stub> stub;  // shared with a call under way
    v1::GetStatusResponse last;
    Clock::time_point answered{};
    bool asked = false;  // a call is under way
  };
  struct Call {
    std::shared_ptr<v1::Attention::Stub> stub;
    grpc::ClientContext context;
    v1::GetStatusRequest request;
    v1::GetStatusResponse response;
  };

  static void AddCounters(const v1::GetStatusResponse& from, EngineTotals& to) {
    to.preemptions += from.preemptions();
    to.prefix_cache_queries += from.prefix_cache_queries();
    to.prefix_cache_hits += from.prefix_cache_hits();
  }

  // Under mutex_.
  void Ask(uint64_t id, Node& node) {
    if (node.channel != node.address->Get()) {
      node.channel = node.address->Get();
      node.stub = v1::Attention::NewStub(node.channel);
    }
    const auto call = std::make_shared<Call>();
    call->stub = node.stub;
    call->context.set_deadline(std::chrono::system_clock::now() + period_);
    v1::Attention::Stub* const stub = call->stub.get();
    stub->async()->GetStatus(&call->context, &call->request, &call->response,
                             [self = shared_from_this(), call, id](const grpc::Status& status) {
                               const std::lock_guard lock(self->mutex_);
                               const auto node = self->nodes_.find(id);
                               if (node == self->nodes_.end()) return;
                               node->second.asked = false;
                               if (!status.ok()) return;
                               node->second.last = call->response;
                               node->second.answered = Clock::now();
                             });
  }

  const std::shared_ptr<tls::Identity> identity_;  // shared with the process's other connections
  const std::chrono::milliseconds period_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, Node> nodes_;  // guarded by mutex_; by node id
  EngineTotals left_;               // guarded by mutex_; counters of nodes that have gone
  bool stopping_ = false;           // guarded by mutex_
  friend class StatusPoller;
  std::thread thread_;
};

StatusPoller::StatusPoller(std::shared_ptr<tls::Identity> identity, std::chrono::milliseconds period)
    : impl_(std::make_shared<Impl>(std::move(identity), period)) {
  impl_->thread_ = std::thread([raw = impl_.get()] { raw->Run(); });
}
StatusPoller::~StatusPoller() {
  impl_->Stop();
  impl_->thread_.join();  // calls under way end at their deadline, with a share of what they need
}
void StatusPoller::UpdateNodes(const std::vector<AttentionNode>& nodes) { impl_->UpdateNodes(nodes); }
EngineTotals StatusPoller::totals() const { return impl_->totals(); }

}  // namespace minke::gateway
