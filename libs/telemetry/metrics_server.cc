#include "libs/telemetry/metrics_server.h"

#include <prometheus/exposer.h>

#include <exception>

#include "libs/base/mutex.h"
#include "libs/base/strings.h"
#include "libs/telemetry/prometheus_families.h"

namespace minke::telemetry {
namespace {

class Source final : public prometheus::Collectable {
 public:
  explicit Source(Collector collector) : collector_(std::move(collector)) {}
  std::vector<prometheus::MetricFamily> Collect() const override {
    Page page;
    const MutexLock lock(mutex_);
    if (collector_ != nullptr) collector_(page);
    return ToPrometheus(page);
  }
  // Waits for a scrape under way; later ones find nothing.
  void Clear() {
    const MutexLock lock(mutex_);
    collector_ = nullptr;
  }

 private:
  mutable Mutex mutex_;
  Collector collector_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

struct MetricsServer::Impl {
  std::shared_ptr<Source> source;  // the exposer keeps a weak pointer
  std::unique_ptr<prometheus::Exposer> exposer;
};

MetricsServer::MetricsServer(std::unique_ptr<Impl> impl, const std::string& host) : impl_(std::move(impl)) {
  address_ = StrCat(host, ":", port());
}
MetricsServer::~MetricsServer() {
  impl_->source->Clear();
  // Closing the server waits up to 2 s for its poll to end. A process has one, and ends right after this.
  (void)impl_->exposer.release();
}

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const std::string& listen,
                                                                    Collector collector) {
  auto impl = std::make_unique<Impl>();
  impl->source = std::make_shared<Source>(std::move(collector));
  try {
    impl->exposer = std::make_unique<prometheus::Exposer>(listen, 1);
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        StrCat("metrics: cannot listen on ", listen, ": expected a free port on an address of this host"));
  }
  impl->exposer->RegisterCollectable(impl->source);
  return std::unique_ptr<MetricsServer>(
      new MetricsServer(std::move(impl), listen.substr(0, listen.rfind(':'))));
}

int MetricsServer::port() const { return impl_->exposer->GetListeningPorts().front(); }

}  // namespace minke::telemetry
