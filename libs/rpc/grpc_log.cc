#include "libs/rpc/grpc_log.h"

#include <grpc/support/log.h>

#include <mutex>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/mutex.h"
#include "libs/base/strings.h"

namespace minke::rpc {
namespace {

constexpr char kTag[] = "grpc";
constexpr int kLinesPerSecondMax = 20;

// Thread-safe.
class Limit {
 public:
  bool Allows() {
    int dropped = 0;
    bool allowed = true;
    {
      const MutexLock lock(mutex_);
      const absl::Time now = absl::Now();
      if (now - begin_ >= absl::Seconds(1)) {
        dropped = lines_ - kLinesPerSecondMax;
        begin_ = now;
        lines_ = 0;
      }
      allowed = ++lines_ <= kLinesPerSecondMax;
    }
    if (dropped > 0) log::Warning(kTag, StrCat(dropped, " more lines like those before"));
    return allowed;
  }

 private:
  Mutex mutex_;
  absl::Time begin_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  int lines_ ABSL_GUARDED_BY(mutex_) = 0;
};

void Write(gpr_log_func_args* line) {
  static Limit& limit = *new Limit;  // gRPC's threads may outlive what is static
  if (!limit.Allows()) return;
  switch (line->severity) {
    case GPR_LOG_SEVERITY_DEBUG:
      return log::Debug(kTag, line->message);
    case GPR_LOG_SEVERITY_INFO:
      return log::Info(kTag, line->message);
    case GPR_LOG_SEVERITY_ERROR:
      return log::Warning(kTag, line->message);  // of a connection; what follows from it is said elsewhere
  }
}

}  // namespace

void TakeGrpcLog() {
  static std::once_flag once;
  std::call_once(once, [] { gpr_set_log_function(Write); });
}

}  // namespace minke::rpc
