#include "libs/telemetry/metrics.h"

#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <exception>

#include "libs/base/mutex.h"
#include "libs/base/strings.h"

namespace minke::telemetry {
namespace {

std::vector<prometheus::MetricFamily> ToFamilies(const std::vector<Sample>& samples) {
  std::vector<prometheus::MetricFamily> families;
  for (const Sample& sample : samples) {
    const std::string name = "minke_" + sample.name;
    const bool counter = sample.type == Sample::Type::kCounter;
    if (families.empty() || families.back().name != name) {
      families.push_back(
          {name, sample.help, counter ? prometheus::MetricType::Counter : prometheus::MetricType::Gauge, {}});
    }
    prometheus::ClientMetric metric;
    for (const auto& [label, value] : sample.labels) metric.label.push_back({label, value});
    (counter ? metric.counter.value : metric.gauge.value) = sample.value;
    families.back().metric.push_back(std::move(metric));
  }
  return families;
}

class Source final : public prometheus::Collectable {
 public:
  explicit Source(Collector collector) : collector_(std::move(collector)) {}
  std::vector<prometheus::MetricFamily> Collect() const override {
    const MutexLock lock(mutex_);
    return collector_ == nullptr ? std::vector<prometheus::MetricFamily>() : ToFamilies(collector_());
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

MetricsServer::MetricsServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
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
  return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(impl)));
}

int MetricsServer::port() const { return impl_->exposer->GetListeningPorts().front(); }

std::string RenderText(const std::vector<Sample>& samples) {
  return prometheus::TextSerializer().Serialize(ToFamilies(samples));
}

}  // namespace minke::telemetry
