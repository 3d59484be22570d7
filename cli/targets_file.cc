#include "cli/targets_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "libs/base/strings.h"

namespace minke::cli {

std::string DefaultTargetsFile(int http_port, unsigned user) {
  return (std::filesystem::temp_directory_path() / StrCat("minke-up-", user, "-", http_port, ".targets.json"))
      .string();
}

std::string TargetsJson(const std::string& cluster, std::span<const ScrapeTarget> targets) {
  nlohmann::ordered_json groups = nlohmann::ordered_json::array();
  for (const ScrapeTarget& target : targets) {
    nlohmann::ordered_json labels = {{"job", target.job}, {"member", target.member}, {"cluster", cluster}};
    if (target.tls) labels["__scheme__"] = "https";
    groups.push_back({{"targets", {target.address}}, {"labels", std::move(labels)}});
  }
  return groups.dump(2) + "\n";
}

absl::Status ReplaceFile(const std::string& path, const std::string& content) {
  std::string temporary = path + ".XXXXXX";
  const auto fail = [&](const char* what) {
    const std::string why = std::strerror(errno);
    return absl::UnavailableError(StrCat(what, " ", path, ": ", why));
  };
  const int fd = ::mkostemp(temporary.data(), O_CLOEXEC);
  if (fd < 0) return fail("cannot write");
  const bool written = ::write(fd, content.data(), content.size()) == static_cast<ssize_t>(content.size()) &&
                       ::fchmod(fd, 0644) == 0;  // Prometheus runs as somebody else
  const absl::Status status = written ? absl::OkStatus() : fail("cannot write");
  ::close(fd);
  if (!status.ok() || ::rename(temporary.c_str(), path.c_str()) != 0) {
    const absl::Status error = status.ok() ? fail("cannot replace") : status;
    ::unlink(temporary.c_str());
    return error;
  }
  return absl::OkStatus();
}

}  // namespace minke::cli
