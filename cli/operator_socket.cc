#include "cli/operator_socket.h"

#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <deque>

#include "absl/functional/function_ref.h"
#include "absl/time/clock.h"
#include "libs/base/mutex.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/rpc/connect.h"
#include "libs/rpc/grpc_server.h"
#include "proto/cluster/operator.grpc.pb.h"

namespace minke::cli {
namespace {

constexpr size_t kWaitingCallsMax = 16;
constexpr absl::Duration kCallTimeout = absl::Seconds(10);
constexpr absl::Duration kConnectTimeout = absl::Seconds(5);

absl::StatusOr<sockaddr_un> SocketAddress(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return absl::UnavailableError(StrCat(path, ": expected a path of at most ", sizeof address.sun_path - 1,
                                         " bytes, found ", path.size()));
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

bool SomebodyListens(const sockaddr_un& address) {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return false;
  const bool connected = ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ||
                         errno == EAGAIN;  // its queue is full
  ::close(fd);
  return connected;
}

}  // namespace

std::string OperatorSocketPath(int http_port, const char* runtime_directory, unsigned user) {
  const bool named = runtime_directory != nullptr && *runtime_directory != '\0';
  return StrCat(named ? runtime_directory : "/tmp", "/minke-up-", user, "-", http_port, ".sock");
}

std::string OperatorSocketPath(int http_port) {
  return OperatorSocketPath(http_port, std::getenv("XDG_RUNTIME_DIR"), ::getuid());
}

// gRPC's threads queue calls and wait; the owner makes them.
class OperatorServer::Impl final : public cluster::v1::Operator::Service {
 public:
  Impl(std::string path, Calls calls)
      : path_(std::move(path)),
        calls_(std::move(calls)),
        wake_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  ~Impl() override {
    {
      const MutexLock lock(mutex_);
      closed_ = true;
      waiting_.clear();
    }
    if (server_ != nullptr) {
      server_->Shutdown(absl::Seconds(1));
      ::unlink(path_.c_str());
    }
    ::close(wake_fd_);
  }

  absl::Status Listen() {
    MK_ASSIGN_OR_RETURN(const sockaddr_un address, SocketAddress(path_));
    if (SomebodyListens(address)) {
      return absl::AlreadyExistsError(StrCat(path_, ": another minke up listens there"));
    }
    ::unlink(path_.c_str());
    // From its birth for this user only. Nobody else creates files meanwhile: children are started by this
    // thread, and gRPC writes none.
    const mode_t mask = ::umask(0177);
    auto server = rpc::GrpcServer::Start("unix:" + path_, {this});
    ::umask(mask);
    if (!server.ok()) return absl::UnavailableError(StrCat("cannot listen on ", path_));
    server_ = *std::move(server);
    return absl::OkStatus();
  }

  grpc::Status Scale(grpc::ServerContext*, const cluster::v1::ScaleRequest* request,
                     cluster::v1::ScaleAnswer* answer) override {
    return rpc::ToGrpc(OnOwner([&]() -> absl::Status {
      MK_ASSIGN_OR_RETURN(*answer, calls_.scale(*request));
      return absl::OkStatus();
    }));
  }
  grpc::Status Drain(grpc::ServerContext*, const cluster::v1::DrainRequest* request,
                     cluster::v1::DrainAnswer* answer) override {
    return rpc::ToGrpc(OnOwner([&]() -> absl::Status {
      MK_ASSIGN_OR_RETURN(*answer, calls_.drain(*request));
      return absl::OkStatus();
    }));
  }
  grpc::Status Status(grpc::ServerContext*, const cluster::v1::StatusRequest*,
                      cluster::v1::StatusAnswer* answer) override {
    return rpc::ToGrpc(OnOwner([&] {
      *answer = calls_.status();
      return absl::OkStatus();
    }));
  }

  int wake_fd() const { return wake_fd_; }
  void RunPending() {
    uint64_t ignored = 0;
    [[maybe_unused]] const ssize_t n = ::read(wake_fd_, &ignored, sizeof ignored);
    std::deque<Call*> calls;
    {
      const MutexLock lock(mutex_);
      calls.swap(waiting_);
    }
    for (Call* call : calls) {
      absl::Status result = call->what();
      const MutexLock lock(mutex_);
      call->result = std::move(result);
      call->done = true;
    }
  }

 private:
  struct Call {
    absl::FunctionRef<absl::Status()> what;
    absl::Status result = {};
    bool done = false;
  };

  absl::Status OnOwner(absl::FunctionRef<absl::Status()> what) {
    Call call{what};
    const MutexLock lock(mutex_);
    if (closed_) return absl::UnavailableError("the cluster is stopping");
    if (waiting_.size() >= kWaitingCallsMax) return absl::ResourceExhaustedError("too many calls at once");
    waiting_.push_back(&call);
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_fd_, &one, sizeof one);
    mutex_.Await([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return call.done || closed_; });
    return call.done ? call.result : absl::UnavailableError("the cluster is stopping");
  }

  const std::string path_;
  const Calls calls_;
  const int wake_fd_;
  Mutex mutex_;
  std::deque<Call*> waiting_ ABSL_GUARDED_BY(mutex_);  // they lie on the stacks of those who wait
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  std::unique_ptr<rpc::GrpcServer> server_;
};

OperatorServer::OperatorServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
OperatorServer::~OperatorServer() = default;
int OperatorServer::wake_fd() const { return impl_->wake_fd(); }
void OperatorServer::RunPending() { impl_->RunPending(); }

absl::StatusOr<std::unique_ptr<OperatorServer>> OperatorServer::Start(const std::string& path, Calls calls) {
  auto impl = std::make_unique<Impl>(path, std::move(calls));
  MK_RETURN_IF_ERROR(impl->Listen());
  return std::unique_ptr<OperatorServer>(new OperatorServer(std::move(impl)));
}

struct OperatorClient::Stub {
  std::shared_ptr<grpc::Channel> channel;  // shared with gRPC's stub
  std::unique_ptr<cluster::v1::Operator::Stub> calls;
};

OperatorClient::OperatorClient(std::unique_ptr<Stub> stub) : stub_(std::move(stub)) {}
OperatorClient::~OperatorClient() = default;

absl::StatusOr<std::unique_ptr<OperatorClient>> OperatorClient::Connect(int http_port) {
  const std::string path = OperatorSocketPath(http_port);
  const auto none = [&](const std::string& found) {
    return absl::NotFoundError(StrCat("no minke up of yours serves port ", http_port,
                                      ": expected its socket ", path, ", found ", found));
  };
  struct stat file {};
  if (::lstat(path.c_str(), &file) != 0) return none("none");
  // /tmp is everybody's: another user may have put a socket there.
  if (!S_ISSOCK(file.st_mode) || file.st_uid != ::getuid()) return none("something else there");
  auto stub = std::make_unique<Stub>();
  stub->channel = grpc::CreateChannel("unix:" + path, grpc::InsecureChannelCredentials());
  if (!rpc::Connect(*stub->channel, kConnectTimeout, [] { return false; }).ok()) {
    return none("one that nobody listens on");
  }
  stub->calls = cluster::v1::Operator::NewStub(stub->channel);
  return std::unique_ptr<OperatorClient>(new OperatorClient(std::move(stub)));
}

absl::StatusOr<cluster::v1::ScaleAnswer> OperatorClient::Scale(cluster::v1::Role role, int count) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + kCallTimeout));
  cluster::v1::ScaleRequest request;
  request.set_role(role);
  request.set_count(count);
  cluster::v1::ScaleAnswer answer;
  MK_RETURN_IF_ERROR(rpc::ToAbsl(stub_->calls->Scale(&context, request, &answer)));
  return answer;
}

absl::StatusOr<cluster::v1::StatusAnswer> OperatorClient::Status() {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + kCallTimeout));
  cluster::v1::StatusAnswer answer;
  MK_RETURN_IF_ERROR(rpc::ToAbsl(stub_->calls->Status(&context, {}, &answer)));
  return answer;
}

}  // namespace minke::cli
