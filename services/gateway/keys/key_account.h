// What one API key may use, and what it has used. Thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "libs/base/mutex.h"
#include "libs/telemetry/page.h"

namespace minke::gateway {

struct KeyLimits {  // 0: no limit
  int64_t requests_per_minute = 0;
  int64_t tokens_per_minute = 0;  // of prompts when they are admitted, and generated ones as they come
  int64_t concurrency = 0;        // sequences at once
  friend bool operator==(const KeyLimits&, const KeyLimits&) = default;
};

// Fills up evenly to what a minute allows; an allowance of 0 is none. Thread-compatible.
class MinuteBudget {
 public:
  using Clock = std::chrono::steady_clock;
  // A full one.
  explicit MinuteBudget(int64_t per_minute)
      : per_minute_(static_cast<double>(per_minute)), level_(per_minute_) {}

  // How long until `cost` can be had; 0: now. What costs more than a minute's allowance waits for a full one.
  std::chrono::milliseconds Wait(double cost, Clock::time_point now);
  // May leave it below zero: then it has to fill up first.
  void Take(double cost, Clock::time_point now);
  int64_t Left(Clock::time_point now);

 private:
  void Fill(Clock::time_point now);
  double per_minute_, level_;
  Clock::time_point filled_ = Clock::now();
};

struct KeyRefusal {
  std::string message, code;  // for people; "rate_limit_exceeded"
  int retry_after_s = 1;
};

class KeyAccount : public std::enable_shared_from_this<KeyAccount> {
 public:
  using Clock = std::chrono::steady_clock;
  KeyAccount(std::string name, KeyLimits limits)
      : name_(std::move(name)),
        limits_(limits),
        requests_(limits.requests_per_minute),
        tokens_(limits.tokens_per_minute) {}

  // A request's use of the account. Movable; ends its sequences when destroyed. The default has no account
  // and no limit.
  class Permit {
   public:
    Permit() = default;
    Permit(Permit&&) noexcept = default;
    Permit& operator=(Permit&& other) noexcept;
    ~Permit() { Release(); }
    void Generated(uint64_t tokens);  // that were sent to the client
    // x-ratelimit-... as OpenAI's API has them; empty without limits.
    std::vector<std::pair<std::string, std::string>> Headers() const;

   private:
    friend class KeyAccount;
    Permit(std::shared_ptr<KeyAccount> account, int64_t sequences)
        : account_(std::move(account)), sequences_(sequences) {}
    void Release();
    std::shared_ptr<KeyAccount> account_;  // shared with the others of this key, and the key file
    int64_t sequences_ = 0;
  };

  std::variant<Permit, KeyRefusal> Begin(int64_t sequences, uint64_t prompt_tokens, Clock::time_point now);
  // What Begin would say to the smallest request, without its counting as one unless it is refused: a request
  // need not be read then.
  std::variant<std::monostate, KeyRefusal> Peek(Clock::time_point now);

  const std::string& name() const { return name_; }
  const KeyLimits& limits() const { return limits_; }
  void Collect(telemetry::Page& page) const;

 private:
  std::variant<std::monostate, KeyRefusal> CheckLocked(int64_t sequences, double tokens,
                                                       Clock::time_point now)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string name_;
  const KeyLimits limits_;
  mutable Mutex mutex_;
  MinuteBudget requests_ ABSL_GUARDED_BY(mutex_), tokens_ ABSL_GUARDED_BY(mutex_);
  int64_t sequences_ ABSL_GUARDED_BY(mutex_) = 0;
  // Counted since the process began.
  uint64_t admitted_ ABSL_GUARDED_BY(mutex_) = 0, prompt_tokens_ ABSL_GUARDED_BY(mutex_) = 0,
                     completion_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t refused_[3] ABSL_GUARDED_BY(mutex_) = {};  // by kLimitNames
};

}  // namespace minke::gateway
