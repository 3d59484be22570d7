#include <thread>

#include "libs/base/mutex.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/base/thread_name.h"
#include "libs/etcd/answers.h"
#include "libs/etcd/channels.h"
#include "libs/etcd/client.h"

namespace minke::etcd {

namespace {
constexpr absl::Duration kPause = absl::Milliseconds(100);  // between tries
}

struct Mirror::Impl {
  Client& client;
  const std::string prefix;
  const Events events;
  Mutex mutex;
  bool stop ABSL_GUARDED_BY(mutex) = false;
  std::thread thread;

  Impl(Client& client, std::string prefix, Events events)
      : client(client), prefix(std::move(prefix)), events(std::move(events)) {}
  bool Stopped() {
    const MutexLock lock(mutex);
    return stop;
  }
  void Run();
  absl::Status Follow(bool& synced);
};

// A snapshot, and what happens after it until the watch ends, which is never OK.
absl::Status Mirror::Impl::Follow(bool& synced) {
  MK_ASSIGN_OR_RETURN(Snapshot snapshot, client.GetPrefix(prefix));
  const int64_t revision = snapshot.revision;
  Channels::Call call(client.impl_->channels, /*watches=*/true);
  if (Stopped()) return absl::CancelledError("stopped");  // what cancels calls came before this one
  // So that an etcd that has lost touch with its cluster's majority ends the watch instead of being silent.
  call.context().AddMetadata("hasleader", "true");
  auto stream = call.endpoint().watch->Watch(&call.context());
  etcdserverpb::WatchRequest request;
  request.mutable_create_request()->set_key(prefix);
  request.mutable_create_request()->set_range_end(EndOfPrefix(prefix));
  request.mutable_create_request()->set_start_revision(revision + 1);
  absl::Status end;
  if (stream->Write(request)) {
    synced = true;
    events.changed({.snapshot = true, .put = std::move(snapshot.keys), .revision = revision});
    etcdserverpb::WatchResponse response;
    while (stream->Read(&response)) {
      if (response.canceled()) {
        end = response.compact_revision() > 0
                  ? absl::OutOfRangeError("history compacted away")
                  : absl::UnavailableError(StrCat("etcd ended the watch: ", response.cancel_reason()));
        break;
      }
      if (response.created() && response.header().revision() < revision) {
        end = absl::DataLossError("etcd is behind what it told us: it lost its data, or another member lags");
        break;
      }
      if (response.events().empty()) continue;
      events.changed(ChangeOf(response));
    }
  }
  call.context().TryCancel();
  const absl::Status finish = rpc::ToAbsl(stream->Finish());
  if (!end.ok()) return end;
  if (absl::IsCancelled(finish)) return absl::UnavailableError("no answer in time");  // says another call
  return finish.ok() ? absl::UnavailableError("etcd ended the watch") : finish;
}

void Mirror::Impl::Run() {
  SetThreadName("etcd-mirror");
  bool lost = false;
  while (true) {
    bool synced = false;
    const absl::Status status = Follow(synced);
    if (Stopped()) return;
    if (synced || !lost) events.lost(status);
    lost = true;
    const MutexLock lock(mutex);
    if (mutex.AwaitFor(kPause, [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return stop; })) return;
  }
}

Mirror::Mirror(Client& client, std::string prefix, Events events)
    : impl_(std::make_unique<Impl>(client, std::move(prefix), std::move(events))) {
  impl_->thread = std::thread([raw = impl_.get()] { raw->Run(); });
}

Mirror::~Mirror() {
  {
    const MutexLock lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->client.CancelCalls();
  impl_->thread.join();
}

}  // namespace minke::etcd
