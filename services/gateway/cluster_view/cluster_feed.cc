#include "services/gateway/cluster_view/cluster_feed.h"

#include <algorithm>

#include "libs/base/strings.h"

namespace minke::gateway {
namespace {

using Clock = std::chrono::steady_clock;

// A stream sees so late at most that it is to end.
constexpr std::chrono::milliseconds kLook{250};

}  // namespace

std::shared_ptr<const std::string> ClusterFeed::Latest() {
  const std::lock_guard lock(mutex_);
  const auto now = Clock::now();
  if (latest_ == nullptr || now - made_at_ >= kFresh) {
    latest_ = std::make_shared<const std::string>(make_());
    made_at_ = now;
  }
  return latest_;
}

class ClusterFeed::Stream final : public Exchange {
 public:
  explicit Stream(std::shared_ptr<ClusterFeed> feed) : feed_(std::move(feed)) {}
  ~Stream() override { feed_->listeners_.fetch_sub(1); }

  void Poll(Output* out) override {
    const auto now = Clock::now();
    out->done = feed_->stopped_;
    if (!head_sent_) {
      head_sent_ = true;
      out->head = HttpHead{.content_type = "text/event-stream; charset=utf-8", .stream = true};
    }
    if (out->done || now < next_) return;
    next_ = std::max(next_ + kPeriod, now);  // a slow reader misses some
    out->body = StrCat("data: ", *feed_->Latest(), "\n\n");
  }
  Clock::time_point deadline() const override { return std::min(next_, Clock::now() + kLook); }

 private:
  const std::shared_ptr<ClusterFeed> feed_;  // shared with the gateway and the other streams
  bool head_sent_ = false;
  Clock::time_point next_ = Clock::now();
};

std::unique_ptr<Exchange> ClusterFeed::Listen(const std::shared_ptr<ClusterFeed>& feed) {
  if (feed->listeners_.fetch_add(1) >= kListenersMax) {
    feed->listeners_.fetch_sub(1);
    return nullptr;
  }
  return std::make_unique<Stream>(feed);
}

}  // namespace minke::gateway
