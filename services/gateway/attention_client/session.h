// One Attention.Session stream (gRPC callback API). Deletes itself after OnSessionDone.
#pragma once

#include <grpcpp/grpcpp.h>

#include <deque>
#include <mutex>

#include "proto/inference/inference.grpc.pb.h"

namespace minke::gateway {

class Session;

// Called by gRPC's threads, for one session never concurrently; OnSessionDone is the last call.
class SessionOwner {
 public:
  virtual void OnMessage(Session* session, inference::v1::AttentionMessage* message) = 0;
  virtual void OnSessionDone(Session* session, const grpc::Status& status) = 0;

 protected:
  ~SessionOwner() = default;
};

class Session final
    : public grpc::ClientBidiReactor<inference::v1::GatewayMessage, inference::v1::AttentionMessage> {
 public:
  // Both are borrowed; the owner outlives the session, the stub until OnSessionDone.
  Session(SessionOwner* owner, inference::v1::Attention::Stub* stub) : owner_(*owner) {
    stub->async()->Session(&context_, this);
  }

  void Start() {
    AddHold();  // writes come from outside of reactions; released when reading has ended
    StartRead(&incoming_);
    StartCall();
  }
  // Thread-safe, until OnSessionDone. Queued messages are bounded by the gateway's admission: two per
  // sequence.
  void Send(inference::v1::GatewayMessage message) {
    {
      const std::lock_guard lock(mutex_);
      if (closed_) return;
      queue_.push_back(std::move(message));
      if (writing_) return;
      TakeNextLocked();
    }
    Write();
  }
  // Thread-safe, until OnSessionDone.
  void TryCancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (ok) {
      owner_.OnMessage(this, &incoming_);
      StartRead(&incoming_);
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      queue_.clear();
    }
    RemoveHold();
  }
  void OnWriteDone(bool ok) override {
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      if (!ok || closed_ || queue_.empty()) return;
      TakeNextLocked();
    }
    Write();
  }
  void OnDone(const grpc::Status& status) override {
    owner_.OnSessionDone(this, status);
    delete this;
  }

 private:
  ~Session() override = default;
  void TakeNextLocked() {
    outgoing_ = std::move(queue_.front());
    queue_.pop_front();
    writing_ = true;
    AddHold();  // until StartWrite has returned: reading may end meanwhile
  }
  void Write() {
    StartWrite(&outgoing_);
    RemoveHold();
  }

  SessionOwner& owner_;
  grpc::ClientContext context_;
  inference::v1::AttentionMessage incoming_;
  std::mutex mutex_;
  std::deque<inference::v1::GatewayMessage> queue_;  // guarded by mutex_
  inference::v1::GatewayMessage outgoing_;           // gRPC's while writing_
  bool writing_ = false;                             // guarded by mutex_
  bool closed_ = false;                              // guarded by mutex_
};

}  // namespace minke::gateway
