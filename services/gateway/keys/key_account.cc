#include "services/gateway/keys/key_account.h"

#include <algorithm>
#include <cmath>

#include "libs/base/strings.h"

namespace minke::gateway {
namespace {

enum Limit { kRequests, kTokens, kConcurrency };
constexpr const char* kLimitNames[] = {"requests", "tokens", "concurrency"};

KeyRefusal Refuse(const std::string& message, std::chrono::milliseconds wait) {
  const auto seconds = std::chrono::ceil<std::chrono::seconds>(wait).count();
  return {message, "rate_limit_exceeded", static_cast<int>(std::clamp<int64_t>(seconds, 1, 3600))};
}

}  // namespace

void MinuteBudget::Fill(Clock::time_point now) {
  const double minutes = std::chrono::duration<double, std::ratio<60>>(now - filled_).count();
  filled_ = std::max(filled_, now);
  level_ = std::min(per_minute_, level_ + std::max(0.0, minutes) * per_minute_);
}

std::chrono::milliseconds MinuteBudget::Wait(double cost, Clock::time_point now) {
  if (per_minute_ == 0) return std::chrono::milliseconds(0);
  Fill(now);
  const double missing = std::min(cost, per_minute_) - level_;
  if (missing <= 0) return std::chrono::milliseconds(0);
  return std::chrono::milliseconds(static_cast<int64_t>(std::ceil(missing / per_minute_ * 60'000)));
}

void MinuteBudget::Take(double cost, Clock::time_point now) {
  if (per_minute_ == 0) return;
  Fill(now);
  level_ -= cost;
}

int64_t MinuteBudget::Left(Clock::time_point now) {
  Fill(now);
  return static_cast<int64_t>(std::max(0.0, level_));
}

KeyAccount::Permit& KeyAccount::Permit::operator=(Permit&& other) noexcept {
  Release();
  account_ = std::move(other.account_);
  sequences_ = std::exchange(other.sequences_, 0);
  return *this;
}

void KeyAccount::Permit::Release() {
  if (account_ == nullptr) return;
  {
    const MutexLock lock(account_->mutex_);
    account_->sequences_ -= std::exchange(sequences_, 0);
  }
  account_.reset();
}

void KeyAccount::Permit::Generated(uint64_t tokens) {
  if (account_ == nullptr || tokens == 0) return;
  const Clock::time_point now = Clock::now();
  const MutexLock lock(account_->mutex_);
  account_->completion_tokens_ += tokens;
  account_->tokens_.Take(static_cast<double>(tokens), now);
}

std::vector<std::pair<std::string, std::string>> KeyAccount::Permit::Headers() const {
  std::vector<std::pair<std::string, std::string>> headers;
  if (account_ == nullptr) return headers;
  const KeyLimits& limits = account_->limits_;
  const Clock::time_point now = Clock::now();
  const MutexLock lock(account_->mutex_);
  const auto add = [&](const char* what, int64_t limit, MinuteBudget& budget) {
    if (limit == 0) return;
    headers.emplace_back(StrCat("x-ratelimit-limit-", what), StrCat(limit));
    headers.emplace_back(StrCat("x-ratelimit-remaining-", what), StrCat(budget.Left(now)));
  };
  add("requests", limits.requests_per_minute, account_->requests_);
  add("tokens", limits.tokens_per_minute, account_->tokens_);
  return headers;
}

std::variant<std::monostate, KeyRefusal> KeyAccount::CheckLocked(int64_t sequences, double tokens,
                                                                 Clock::time_point now) {
  const auto refuse = [&](Limit limit, const std::string& message, std::chrono::milliseconds wait)
                          ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
                            ++refused_[limit];
                            return Refuse(message, wait);
                          };
  if (limits_.concurrency > 0 && sequences_ + sequences > limits_.concurrency) {
    return refuse(kConcurrency,
                  StrCat("this API key may have ", limits_.concurrency, " sequences at once; it has ",
                         sequences_, " and asks for ", sequences, " more"),
                  std::chrono::seconds(1));
  }
  if (const auto wait = requests_.Wait(1, now); wait.count() > 0) {
    return refuse(kRequests,
                  StrCat("this API key may send ", limits_.requests_per_minute, " requests per minute"),
                  wait);
  }
  if (const auto wait = tokens_.Wait(tokens, now); wait.count() > 0) {
    return refuse(kTokens,
                  StrCat("this API key may use ", limits_.tokens_per_minute,
                         " tokens per minute, of prompts and generated ones"),
                  wait);
  }
  return std::monostate();
}

std::variant<KeyAccount::Permit, KeyRefusal> KeyAccount::Begin(int64_t sequences, uint64_t prompt_tokens,
                                                               Clock::time_point now) {
  const double tokens = static_cast<double>(prompt_tokens);
  const MutexLock lock(mutex_);
  auto checked = CheckLocked(sequences, tokens, now);
  if (auto* refusal = std::get_if<KeyRefusal>(&checked)) return std::move(*refusal);
  requests_.Take(1, now);
  tokens_.Take(tokens, now);
  sequences_ += sequences;
  ++admitted_;
  prompt_tokens_ += prompt_tokens;
  return Permit(shared_from_this(), sequences);
}

std::variant<std::monostate, KeyRefusal> KeyAccount::Peek(Clock::time_point now) {
  const MutexLock lock(mutex_);
  return CheckLocked(1, 1, now);
}

void KeyAccount::Collect(telemetry::Page& page) const {
  const MutexLock lock(mutex_);
  const telemetry::Labels key = {{"key", name_}};
  page.Counter("minke:key_requests_total", "Requests of an API key that were admitted",
               static_cast<double>(admitted_), key);
  page.Counter("minke:key_prompt_tokens_total", "Prompt tokens of an API key",
               static_cast<double>(prompt_tokens_), key);
  page.Counter("minke:key_completion_tokens_total", "Tokens generated for an API key",
               static_cast<double>(completion_tokens_), key);
  page.Gauge("minke:key_sequences", "Sequences that an API key has now", static_cast<double>(sequences_),
             key);
  for (const Limit limit : {kRequests, kTokens, kConcurrency}) {
    page.Counter("minke:key_refused_total", "Requests of an API key that were refused, by the limit they met",
                 static_cast<double>(refused_[limit]), {{"key", name_}, {"limit", kLimitNames[limit]}});
  }
}

}  // namespace minke::gateway
