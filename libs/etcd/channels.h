// Inside of libs/etcd: channels to the endpoints, of which one is in use, and the calls under way.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "libs/base/mutex.h"
#include "libs/etcd/client.h"
#include "libs/rpc/connect.h"
#include "libs/rpc/credentials.h"
#include "libs/rpc/grpc_server.h"
#include "proto/etcd/etcd.grpc.pb.h"

namespace minke::etcd {

// Thread-safe.
class Channels {
 public:
  struct Endpoint {
    explicit Endpoint(std::shared_ptr<grpc::Channel> channel);
    const std::shared_ptr<grpc::Channel> channel;  // shared with the stubs
    std::unique_ptr<etcdserverpb::KV::Stub> kv;
    std::unique_ptr<etcdserverpb::Watch::Stub> watch;
    std::unique_ptr<etcdserverpb::Lease::Stub> lease;
  };

  // A call under way, so that CancelAll and MoveOn reach it.
  class Call {
   public:
    Call(Channels& channels, bool watches);
    ~Call();
    grpc::ClientContext& context() { return context_; }
    Endpoint& endpoint() { return *endpoint_; }
    size_t index() const { return index_; }
    bool cancelled() const;

   private:
    friend class Channels;
    Channels& channels_;
    const bool watches_;
    grpc::ClientContext context_;
    size_t index_ = 0;
    std::shared_ptr<Endpoint> endpoint_;
    bool cancelled_ = false;  // guarded by channels_.mutex_
  };

  explicit Channels(ClientOptions options);

  // Tries `call(endpoint, context)` at each endpoint once, beginning with the one in use.
  template <typename Function>
  absl::Status Do(const Function& call) {
    absl::Status status;
    for (size_t i = 0; i < options_.endpoints.size(); ++i) {
      Call here(*this, /*watches=*/false);
      const absl::Time deadline = absl::Now() + options_.call_timeout;
      status =
          rpc::Connect(*here.endpoint().channel, options_.call_timeout, [&] { return here.cancelled(); });
      if (status.ok()) {
        here.context().set_deadline(absl::ToChronoTime(deadline));
        status = rpc::ToAbsl(call(here.endpoint(), here.context()));
      }
      if (here.cancelled()) return absl::CancelledError("cancelled");
      if (!absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status)) return status;
      MoveOn(here.index());
    }
    return status;
  }

  // The endpoint does not answer: the next one is in use from now on, and watches there end.
  void MoveOn(size_t from);
  void CancelAll();

 private:
  std::shared_ptr<Endpoint> EndpointInUseLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Made anew after the certificates have changed; calls keep the one they began with.
  struct Known {
    rpc::SecureChannel channel;
    std::shared_ptr<Endpoint> endpoint;
  };
  const ClientOptions options_;
  Mutex mutex_;
  std::vector<Known> endpoints_ ABSL_GUARDED_BY(mutex_);
  size_t in_use_ ABSL_GUARDED_BY(mutex_) = 0;
  std::set<Call*> calls_ ABSL_GUARDED_BY(mutex_);
};

struct Client::Impl {
  explicit Impl(ClientOptions options) : channels(std::move(options)) {}
  Channels channels;
};

// The end of the range of keys that begin so.
std::string EndOfPrefix(std::string prefix);

}  // namespace minke::etcd
