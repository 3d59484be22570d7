#include "libs/etcd/client.h"

#include <cmath>

#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/etcd/answers.h"
#include "libs/etcd/channels.h"

namespace minke::etcd {
namespace {

constexpr int kMessageBytesMax = 64 << 20;  // a snapshot of the largest cluster is a few

void Fill(const Transaction::Operation& operation, etcdserverpb::RequestOp& out) {
  switch (operation.what) {
    case Transaction::Operation::What::kGet:
      out.mutable_request_range()->set_key(operation.key);
      return;
    case Transaction::Operation::What::kPut:
      out.mutable_request_put()->set_key(operation.key);
      out.mutable_request_put()->set_value(operation.value);
      out.mutable_request_put()->set_lease(operation.lease);
      return;
    case Transaction::Operation::What::kDelete:
      out.mutable_request_delete_range()->set_key(operation.key);
      return;
  }
}

void Fill(const Transaction::Compare& compare, etcdserverpb::Compare& out) {
  out.set_result(etcdserverpb::Compare::EQUAL);
  out.set_key(compare.key);
  if (compare.prefix) out.set_range_end(EndOfPrefix(compare.key));
  switch (compare.what) {
    case Transaction::Compare::What::kCreateRevision:
      out.set_target(etcdserverpb::Compare::CREATE);
      out.set_create_revision(compare.revision);
      return;
    case Transaction::Compare::What::kModRevision:
      out.set_target(etcdserverpb::Compare::MOD);
      out.set_mod_revision(compare.revision);
      return;
    case Transaction::Compare::What::kValue:
      out.set_target(etcdserverpb::Compare::VALUE);
      out.set_value(compare.value);
      return;
  }
}

}  // namespace

std::string EndOfPrefix(std::string prefix) {
  while (!prefix.empty() && static_cast<unsigned char>(prefix.back()) == 0xff) prefix.pop_back();
  if (prefix.empty()) return std::string(1, '\0');  // etcd's word for: to the last key
  ++prefix.back();
  return prefix;
}

Channels::Call::Call(Channels& channels, bool watches) : channels_(channels), watches_(watches) {
  const MutexLock lock(channels_.mutex_);
  index_ = channels_.in_use_;
  endpoint_ = channels_.EndpointInUseLocked();
  channels_.calls_.insert(this);
}

Channels::Call::~Call() {
  const MutexLock lock(channels_.mutex_);
  channels_.calls_.erase(this);
}

bool Channels::Call::cancelled() const {
  const MutexLock lock(channels_.mutex_);
  return cancelled_;
}

Channels::Channels(ClientOptions options) : options_(std::move(options)) {
  MK_CHECK(!options_.endpoints.empty());
  grpc::ChannelArguments arguments;
  // etcd ends connections that ping more often than every 5 s.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 6000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 2000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 500);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetMaxReceiveMessageSize(kMessageBytesMax);
  const MutexLock lock(mutex_);
  for (const std::string& address : options_.endpoints)
    endpoints_.push_back({rpc::SecureChannel(address, options_.identity, arguments), nullptr});
}

Channels::Endpoint::Endpoint(std::shared_ptr<grpc::Channel> to)
    : channel(std::move(to)),
      kv(etcdserverpb::KV::NewStub(channel)),
      watch(etcdserverpb::Watch::NewStub(channel)),
      lease(etcdserverpb::Lease::NewStub(channel)) {}

std::shared_ptr<Channels::Endpoint> Channels::EndpointInUseLocked() {
  Known& known = endpoints_[in_use_];
  const std::shared_ptr<grpc::Channel>& channel = known.channel.Get();
  if (known.endpoint == nullptr || known.endpoint->channel != channel)
    known.endpoint = std::make_shared<Endpoint>(channel);
  return known.endpoint;
}

void Channels::MoveOn(size_t from) {
  const MutexLock lock(mutex_);
  if (in_use_ != from) return;  // somebody else did
  in_use_ = (from + 1) % options_.endpoints.size();
  for (Call* call : calls_) {
    if (call->watches_ && call->index_ == from) call->context_.TryCancel();
  }
}

void Channels::CancelAll() {
  const MutexLock lock(mutex_);
  for (Call* call : calls_) {
    call->cancelled_ = true;
    call->context_.TryCancel();
  }
}

Transaction& Transaction::IfCreated(std::string key, int64_t revision) {
  compares.push_back({.what = Compare::What::kCreateRevision, .key = std::move(key), .revision = revision});
  return *this;
}
Transaction& Transaction::IfModified(std::string key, int64_t revision) {
  compares.push_back({.what = Compare::What::kModRevision, .key = std::move(key), .revision = revision});
  return *this;
}
Transaction& Transaction::IfValue(std::string key, std::string value) {
  compares.push_back({.what = Compare::What::kValue, .key = std::move(key), .value = std::move(value)});
  return *this;
}
Transaction& Transaction::IfNoneUnder(std::string prefix) {
  compares.push_back({.what = Compare::What::kCreateRevision, .key = std::move(prefix), .prefix = true});
  return *this;
}
Transaction& Transaction::Put(std::string key, std::string value, int64_t lease) {
  then.push_back({Operation::What::kPut, std::move(key), std::move(value), lease});
  return *this;
}
Transaction& Transaction::Delete(std::string key) {
  then.push_back({Operation::What::kDelete, std::move(key)});
  return *this;
}
Transaction& Transaction::OtherwiseGet(std::string key) {
  otherwise.push_back({Operation::What::kGet, std::move(key)});
  return *this;
}

Client::Client(ClientOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
Client::~Client() = default;

absl::StatusOr<Snapshot> Client::Get(const std::string& key) {
  etcdserverpb::RangeRequest request;
  request.set_key(key);
  etcdserverpb::RangeResponse response;
  MK_RETURN_IF_ERROR(impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    return endpoint.kv->Range(&context, request, &response);
  }));
  return SnapshotOf(response);
}

absl::StatusOr<Snapshot> Client::GetPrefix(const std::string& prefix) {
  etcdserverpb::RangeRequest request;
  request.set_key(prefix);
  request.set_range_end(EndOfPrefix(prefix));
  etcdserverpb::RangeResponse response;
  MK_RETURN_IF_ERROR(impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    return endpoint.kv->Range(&context, request, &response);
  }));
  return SnapshotOf(response);
}

absl::StatusOr<int64_t> Client::Put(const std::string& key, const std::string& value, int64_t lease) {
  etcdserverpb::PutRequest request;
  request.set_key(key);
  request.set_value(value);
  request.set_lease(lease);
  etcdserverpb::PutResponse response;
  MK_RETURN_IF_ERROR(impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    return endpoint.kv->Put(&context, request, &response);
  }));
  return response.header().revision();
}

absl::StatusOr<TransactionResult> Client::Commit(const Transaction& transaction) {
  etcdserverpb::TxnRequest request;
  for (const auto& compare : transaction.compares) Fill(compare, *request.add_compare());
  for (const auto& operation : transaction.then) Fill(operation, *request.add_success());
  for (const auto& operation : transaction.otherwise) Fill(operation, *request.add_failure());
  etcdserverpb::TxnResponse response;
  MK_RETURN_IF_ERROR(impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    return endpoint.kv->Txn(&context, request, &response);
  }));
  TransactionResult result;
  result.succeeded = response.succeeded();
  result.revision = response.header().revision();
  for (const auto& each : response.responses()) {
    for (const auto& kv : each.response_range().kvs()) result.got.push_back(FromProto(kv));
  }
  return result;
}

absl::Status Client::Compact(int64_t revision) {
  etcdserverpb::CompactionRequest request;
  request.set_revision(revision);
  etcdserverpb::CompactionResponse response;
  return impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    return endpoint.kv->Compact(&context, request, &response);
  });
}

absl::StatusOr<int64_t> Client::GrantLease(absl::Duration ttl) {
  etcdserverpb::LeaseGrantRequest request;
  request.set_ttl(static_cast<int64_t>(std::ceil(absl::ToDoubleSeconds(ttl))));
  etcdserverpb::LeaseGrantResponse response;
  MK_RETURN_IF_ERROR(impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    return endpoint.lease->LeaseGrant(&context, request, &response);
  }));
  return response.id();
}

// A stream per renewal, so that each has its deadline and may go to another endpoint.
absl::StatusOr<absl::Duration> Client::RenewLease(int64_t lease) {
  etcdserverpb::LeaseKeepAliveRequest request;
  request.set_id(lease);
  etcdserverpb::LeaseKeepAliveResponse response;
  MK_RETURN_IF_ERROR(impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    auto stream = endpoint.lease->LeaseKeepAlive(&context);
    stream->Write(request);
    stream->WritesDone();
    const bool answered = stream->Read(&response);
    const grpc::Status end = stream->Finish();
    if (!answered && end.ok()) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "no answer to a renewal");
    return answered ? grpc::Status::OK : end;
  }));
  if (response.ttl() <= 0) return absl::NotFoundError("the lease ran out");
  return absl::Seconds(response.ttl());
}

absl::Status Client::RevokeLease(int64_t lease) {
  etcdserverpb::LeaseRevokeRequest request;
  request.set_id(lease);
  etcdserverpb::LeaseRevokeResponse response;
  return impl_->channels.Do([&](Channels::Endpoint& endpoint, grpc::ClientContext& context) {
    return endpoint.lease->LeaseRevoke(&context, request, &response);
  });
}

void Client::CancelCalls() { impl_->channels.CancelAll(); }

}  // namespace minke::etcd
