// An attention node whose text is a script: token k of a sequence is byte (seed + k) of it. For the gateway's
// tests.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "proto/inference/inference.grpc.pb.h"

namespace minke::gateway {

// Ids of the byte-level tokenizer files: 0 BOS, 1 EOS, then the bytes.
inline uint32_t ByteId(unsigned char byte) { return 2u + byte; }

// The log-probability the fake gives a token: many digits, so that rounding would show.
inline float FakeLogprob(uint32_t id) { return -1.0f / (3.0f + static_cast<float>(id)); }

// What its first event says of the time in the admission queue.
inline constexpr uint64_t kQueueUs = 400'000;

class FakeAttention final : public inference::v1::Attention::Service {
 public:
  FakeAttention() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.SetMaxReceiveMessageSize(64 << 20);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    address_ = "127.0.0.1:" + std::to_string(port);
  }
  ~FakeAttention() override {
    CutSessions();
    server_->Shutdown(std::chrono::system_clock::now());
  }

  const std::string& address() const { return address_; }
  // Bytes a sequence walks through, again and again; '\x03' stands for EOS.
  void set_script(std::string script) {
    const std::lock_guard lock(mutex_);
    script_ = std::move(script);
  }
  // Sequences stop before generating token `tokens` until it is raised.
  void HoldAfter(uint32_t tokens) { hold_after_ = tokens; }
  // The node's latent cache now holds (or no longer holds) these prefixes.
  void SetPrefixes(const std::vector<uint64_t>& names, bool held) {
    const std::lock_guard lock(mutex_);
    for (const uint64_t name : names) prefixes_.emplace_back(name, held);
  }
  // Says nothing any more, not even that it is alive, as a stopped process or one without a network.
  void SetFrozen(bool frozen) { frozen_ = frozen; }
  // What every new sequence is answered with; OK: generation.
  void RefuseWith(grpc::StatusCode code) { refuse_ = code; }
  // What it says of its load.
  void SetStatus(inference::v1::GetStatusResponse status) {
    const std::lock_guard lock(mutex_);
    status_ = std::move(status);
  }
  grpc::Status GetStatus(grpc::ServerContext*, const inference::v1::GetStatusRequest*,
                         inference::v1::GetStatusResponse* response) override {
    const std::lock_guard lock(mutex_);
    *response = status_;
    return grpc::Status::OK;
  }
  // Breaks every session, as a node that dies does.
  void CutSessions() {
    const std::lock_guard lock(mutex_);
    for (grpc::ServerContext* context : contexts_) context->TryCancel();
  }
  int active() const { return active_; }
  int cancels() const { return cancels_; }
  int submits() const { return submits_; }
  // The last Submit.
  inference::v1::Submit last_submit() const {
    const std::lock_guard lock(mutex_);
    return last_submit_;
  }

  grpc::Status Session(grpc::ServerContext* context,
                       grpc::ServerReaderWriter<inference::v1::AttentionMessage,
                                                inference::v1::GatewayMessage>* stream) override {
    {
      const std::lock_guard lock(mutex_);
      contexts_.insert(context);
    }
    struct State {
      std::mutex mutex;
      std::map<uint64_t, Sequence> sequences;
      uint64_t beat = 0;  // to answer
      bool done = false;
    } state;
    std::thread engine([&] {
      size_t told = 0;  // of prefixes_
      for (;;) {
        inference::v1::AttentionMessage message;
        if (frozen_) {
          {
            const std::lock_guard lock(state.mutex);
            if (state.done) return;
          }
          std::this_thread::sleep_for(std::chrono::microseconds(500));
          continue;
        }
        {
          const std::lock_guard lock2(mutex_);
          for (; told < prefixes_.size(); ++told) {
            message.add_prefixes(prefixes_[told].first);
            message.add_prefix_gained(prefixes_[told].second);
          }
        }
        {
          const std::lock_guard lock(state.mutex);
          if (state.done) return;
          message.set_beat(std::exchange(state.beat, 0));
          for (auto entry = state.sequences.begin(); entry != state.sequences.end();) {
            const bool finished = Step(entry->second, &message);
            if (finished) --active_;
            entry = finished ? state.sequences.erase(entry) : std::next(entry);
          }
        }
        if (message.ByteSizeLong() > 0 && !stream->Write(message)) return;
        std::this_thread::sleep_for(std::chrono::microseconds(500));
      }
    });
    inference::v1::GatewayMessage message;
    while (stream->Read(&message)) {
      const std::lock_guard lock(state.mutex);
      if (message.has_beat()) {
        state.beat = message.beat();
      } else if (message.has_submit()) {
        ++submits_;
        ++active_;
        const uint64_t id = message.submit().request_id();
        {
          const std::lock_guard lock2(mutex_);
          last_submit_ = message.submit();
        }
        state.sequences[id] = {message.submit(),
                               static_cast<uint32_t>(message.submit().generated_token_ids_size()), 1};
      } else if (state.sequences.erase(message.cancel().request_id()) > 0) {
        ++cancels_;
        --active_;
      }
    }
    {
      const std::lock_guard lock(state.mutex);
      state.done = true;
      active_ -= static_cast<int>(state.sequences.size());
    }
    engine.join();
    const std::lock_guard lock(mutex_);
    contexts_.erase(context);
    return grpc::Status::OK;
  }

 private:
  struct Sequence {
    inference::v1::Submit submit;
    uint32_t generated = 0;
    int prompt_at = 1;  // next prompt token whose log-probability is due
  };

  static void AddLogprobs(uint32_t id, uint32_t top, inference::v1::TokenLogprobs* out) {
    out->set_token_id(id);
    out->set_logprob(FakeLogprob(id));
    for (uint32_t i = 0; i < top; ++i) {
      out->add_top_token_ids(ByteId('A') + i);
      out->add_top_logprobs(FakeLogprob(ByteId('A') + i));
    }
  }

  // One token, or a piece of the prompt. True: finished.
  bool Step(Sequence& sequence, inference::v1::AttentionMessage* message) {
    const auto& submit = sequence.submit;
    const auto& sampling = submit.sampling();
    const auto add_event = [&] {
      auto* event = message->add_events();
      event->set_request_id(submit.request_id());
      event->set_generation(submit.generation());
      return event;
    };
    if (refuse_ != grpc::StatusCode::OK) {
      auto* event = add_event();
      event->set_finish_reason(inference::v1::FINISH_REASON_ERROR);
      event->mutable_error()->set_code(refuse_);
      event->mutable_error()->set_message("refused by the fake");
      return true;
    }
    if (sampling.want_prompt_logprobs() && sequence.prompt_at < submit.prompt_token_ids_size()) {
      auto* event = add_event();  // three at a time: the gateway has to put them together
      for (int i = 0; i < 3 && sequence.prompt_at < submit.prompt_token_ids_size();
           ++i, ++sequence.prompt_at) {
        AddLogprobs(submit.prompt_token_ids(sequence.prompt_at), sampling.top_prompt_logprobs(),
                    event->add_prompt_logprobs());
      }
      return false;
    }
    if (sequence.generated >= sampling.max_tokens()) {
      add_event()->set_finish_reason(inference::v1::FINISH_REASON_LENGTH);
      return true;
    }
    if (sequence.generated >= hold_after_) return false;
    uint32_t id = 0;
    {
      const std::lock_guard lock(mutex_);
      const auto byte =
          static_cast<unsigned char>(script_[(sampling.seed() + sequence.generated) % script_.size()]);
      id = byte == 3 ? 1 : ByteId(byte);
    }
    auto* event = add_event();
    event->add_token_ids(id);
    if (sequence.generated == 0) event->set_queue_us(kQueueUs);
    if (sampling.want_logprobs()) AddLogprobs(id, sampling.top_logprobs(), event->add_logprobs());
    ++sequence.generated;
    for (const uint32_t stop : sampling.stop_token_ids()) {
      if (stop == id) event->set_finish_reason(inference::v1::FINISH_REASON_STOP);
    }
    if (event->finish_reason() == 0 && sequence.generated >= sampling.max_tokens()) {
      event->set_finish_reason(inference::v1::FINISH_REASON_LENGTH);
    }
    return event->finish_reason() != 0;
  }

  mutable std::mutex mutex_;
  std::string script_ = "abc";                       // guarded by mutex_
  std::set<grpc::ServerContext*> contexts_;          // guarded by mutex_
  inference::v1::Submit last_submit_;                // guarded by mutex_
  inference::v1::GetStatusResponse status_;          // guarded by mutex_
  std::vector<std::pair<uint64_t, bool>> prefixes_;  // guarded by mutex_
  std::atomic<uint32_t> hold_after_{1u << 30};
  std::atomic<grpc::StatusCode> refuse_{grpc::StatusCode::OK};
  std::atomic<bool> frozen_{false};
  std::atomic<int> active_{0}, cancels_{0}, submits_{0};
  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace minke::gateway
