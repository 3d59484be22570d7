#include "cli/operator_socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::cli {
namespace {

using ::testing::HasSubstr;

constexpr int kPort = 8000;

// Each test has a runtime directory of its own.
class OperatorSocket : public ::testing::Test {
 protected:
  OperatorSocket() {
    EXPECT_NE(::mkdtemp(folder_.data()), nullptr);
    ::setenv("XDG_RUNTIME_DIR", folder_.c_str(), 1);
  }
  ~OperatorSocket() override { std::filesystem::remove_all(folder_); }

  static OperatorServer::Calls Answers(uint32_t before) {
    return {
        .scale =
            [before](const cluster::v1::ScaleRequest& request) -> absl::StatusOr<cluster::v1::ScaleAnswer> {
          if (request.count() == 0) return absl::InvalidArgumentError("expected at least 1");
          cluster::v1::ScaleAnswer answer;
          answer.set_before(before);
          return answer;
        },
        .status =
            [] {
              cluster::v1::StatusAnswer answer;
              answer.set_http_port("8000");
              return answer;
            }};
  }
  // A socket file that outlived its process.
  static void LeaveBehind(const std::string& path) {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    ASSERT_EQ(::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ::close(fd);
    ASSERT_TRUE(std::filesystem::exists(path));
  }

  std::string folder_ = (std::filesystem::temp_directory_path() / "minke-operator-XXXXXX").string();
};

// Makes the calls that come, on a thread of its own.
class Owner {
 public:
  explicit Owner(OperatorServer& server)
      : thread_([&server](std::stop_token stop) {
          while (!stop.stop_requested()) {
            pollfd fd{server.wake_fd(), POLLIN, 0};
            if (::poll(&fd, 1, 5) > 0) server.RunPending();
          }
        }) {}

 private:
  std::jthread thread_;
};

TEST_F(OperatorSocket, NoClusterIsOneClearError) {
  const auto client = OperatorClient::Connect(kPort);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(client.status().message(), HasSubstr("serves port 8000"));
  EXPECT_THAT(client.status().message(), HasSubstr(OperatorSocketPath(kPort)));
}

TEST_F(OperatorSocket, SocketWithoutListenerIsNoClusterAndIsReplaced) {
  const std::string path = OperatorSocketPath(kPort);
  LeaveBehind(path);
  EXPECT_THAT(OperatorClient::Connect(kPort).status().message(), HasSubstr("nobody listens"));
  const auto server = OperatorServer::Start(path, Answers(2));
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE(OperatorClient::Connect(kPort).ok());
}

TEST_F(OperatorSocket, LivingClusterIsNotReplaced) {
  const std::string path = OperatorSocketPath(kPort);
  const auto first = OperatorServer::Start(path, Answers(2));
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(OperatorServer::Start(path, Answers(3)).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(OperatorClient::Connect(kPort).ok());
}

TEST_F(OperatorSocket, FileThatIsNoSocketIsNotConnectedTo) {
  std::filesystem::create_directory(OperatorSocketPath(kPort));
  EXPECT_THAT(OperatorClient::Connect(kPort).status().message(), HasSubstr("something else"));
  EXPECT_FALSE(OperatorServer::Start(OperatorSocketPath(kPort), Answers(1)).ok());
}

TEST_F(OperatorSocket, PathTooLongForASocketIsAnError) {
  const auto server = OperatorServer::Start(folder_ + "/" + std::string(120, 'x'), Answers(1));
  EXPECT_THAT(server.status().message(), HasSubstr("at most 107 bytes"));
}

TEST_F(OperatorSocket, CallsReachTheirClusterAndErrorsComeBack) {
  const auto one = OperatorServer::Start(OperatorSocketPath(kPort), Answers(2));
  const auto other = OperatorServer::Start(OperatorSocketPath(kPort + 1), Answers(7));
  ASSERT_TRUE(one.ok() && other.ok());
  struct stat file {};
  ASSERT_EQ(::stat(OperatorSocketPath(kPort).c_str(), &file), 0);
  EXPECT_EQ(file.st_mode & 0777, 0600u);
  const Owner owner(**one), other_owner(**other);
  const auto client = OperatorClient::Connect(kPort);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ((*client)->Scale(cluster::v1::ROLE_EXPERT, 4)->before(), 2u);
  EXPECT_EQ((*client)->Status()->http_port(), "8000");
  const auto refused = (*client)->Scale(cluster::v1::ROLE_EXPERT, 0);
  EXPECT_EQ(refused.status(), absl::InvalidArgumentError("expected at least 1"));
  EXPECT_EQ((*OperatorClient::Connect(kPort + 1))->Scale(cluster::v1::ROLE_EXPERT, 4)->before(), 7u);
}

TEST_F(OperatorSocket, CallsThatWaitEndWithTheCluster) {
  auto server = OperatorServer::Start(OperatorSocketPath(kPort), Answers(2));
  ASSERT_TRUE(server.ok()) << server.status();
  const auto client = OperatorClient::Connect(kPort);
  ASSERT_TRUE(client.ok()) << client.status();
  absl::Status status;
  std::thread caller([&] { status = (*client)->Status().status(); });
  pollfd fd{(*server)->wake_fd(), POLLIN, 0};
  ASSERT_EQ(::poll(&fd, 1, 10000), 1);
  server->reset();
  caller.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(std::filesystem::exists(OperatorSocketPath(kPort)));
}

TEST(OperatorSocketPath, NamesUserAndPort) {
  EXPECT_EQ(OperatorSocketPath(8000, "/run/user/7", 7), "/run/user/7/minke-up-7-8000.sock");
  EXPECT_EQ(OperatorSocketPath(8000, nullptr, 7), "/tmp/minke-up-7-8000.sock");
  EXPECT_EQ(OperatorSocketPath(8000, "", 7), "/tmp/minke-up-7-8000.sock");
}

}  // namespace
}  // namespace minke::cli
