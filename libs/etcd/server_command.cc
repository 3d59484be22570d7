#include "libs/etcd/server_command.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <sstream>

#include "libs/base/strings.h"

namespace minke::etcd {

absl::StatusOr<std::string> FindServer() {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string program = (folder.empty() ? "." : folder) + "/etcd";
    if (::access(program.c_str(), X_OK) == 0) return program;
  }
  return absl::NotFoundError(
      "expected etcd in PATH, found none; Debian's package is etcd-server (or name a running one with "
      "--etcd)");
}

absl::StatusOr<int> FreePort() {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  const bool ok = fd >= 0 && ::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
                  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0;
  if (fd >= 0) ::close(fd);
  if (!ok) return absl::ResourceExhaustedError("no free TCP port on 127.0.0.1");
  return ntohs(address.sin_port);
}

std::vector<std::string> ServerArguments(const std::string& directory, int client_port, int peer_port,
                                         const tls::Files& files) {
  const std::string scheme = files.empty() ? "http" : "https";
  const std::string client = StrCat(scheme, "://127.0.0.1:", client_port);
  const std::string peer = StrCat(scheme, "://127.0.0.1:", peer_port);
  std::vector<std::string> arguments = {"--name=minke",
                                        "--data-dir=" + directory,
                                        "--listen-client-urls=" + client,
                                        "--advertise-client-urls=" + client,
                                        "--listen-peer-urls=" + peer,
                                        "--initial-advertise-peer-urls=" + peer,
                                        "--initial-cluster=minke=" + peer,
                                        "--auto-compaction-mode=periodic",
                                        "--auto-compaction-retention=10m",
                                        "--logger=zap",
                                        "--log-level=error"};
  if (files.empty()) return arguments;
  for (const char* side : {"", "peer-"}) {
    arguments.push_back(StrCat("--", side, "cert-file=", files.certificate.path));
    arguments.push_back(StrCat("--", side, "key-file=", files.key.path));
    arguments.push_back(StrCat("--", side, "trusted-ca-file=", files.ca.path));
    arguments.push_back(StrCat("--", side, "client-cert-auth"));
  }
  return arguments;
}

}  // namespace minke::etcd
