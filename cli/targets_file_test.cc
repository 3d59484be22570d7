#include "cli/targets_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "gtest/gtest.h"
#include "libs/base/strings.h"

namespace minke::cli {
namespace {

std::string Read(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

class TargetsFile : public testing::Test {
 protected:
  TargetsFile() {
    std::string pattern = (std::filesystem::temp_directory_path() / "minke-targets-XXXXXX").string();
    folder_ = ::mkdtemp(pattern.data());
  }
  ~TargetsFile() override { std::filesystem::remove_all(folder_); }
  std::string folder_;
};

TEST_F(TargetsFile, IsWhatFileDiscoveryReads) {
  const ScrapeTarget targets[] = {{"127.0.0.1:9100", "minke-expert", "expert 0"},
                                  {"127.0.0.1:8000", "minke-gateway", "gateway", true}};
  const auto json = nlohmann::json::parse(TargetsJson("blue", targets));
  ASSERT_EQ(json.size(), 2u);
  EXPECT_EQ(json[0]["targets"], nlohmann::json::array({"127.0.0.1:9100"}));
  EXPECT_EQ(json[0]["labels"]["job"], "minke-expert");
  EXPECT_EQ(json[0]["labels"]["member"], "expert 0");
  EXPECT_EQ(json[1]["labels"]["cluster"], "blue");
  EXPECT_FALSE(json[0]["labels"].contains("__scheme__"));
  EXPECT_EQ(json[1]["labels"]["__scheme__"], "https");
  EXPECT_EQ(nlohmann::json::parse(TargetsJson("blue", {})), nlohmann::json::array());
}

TEST_F(TargetsFile, IsReplacedAsAWholeAndReadableByOthers) {
  const std::string path = folder_ + "/targets.json";
  ASSERT_TRUE(ReplaceFile(path, std::string(10'000, 'a')).ok());
  std::ifstream reader(path);  // opened before, it reads the old content to its end
  ASSERT_TRUE(ReplaceFile(path, "short").ok());
  std::stringstream old;
  old << reader.rdbuf();
  EXPECT_EQ(old.str().size(), 10'000u);
  EXPECT_EQ(Read(path), "short");
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0644u);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1);  // nothing is left over
}

TEST_F(TargetsFile, SaysWhyItCannotBeWritten) {
  const absl::Status status = ReplaceFile(folder_ + "/none/targets.json", "x");
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(status.message().find("/none/targets.json: No such file"), std::string::npos) << status;
}

TEST_F(TargetsFile, ASymbolicLinkIsReplacedNotFollowed) {
  const std::string other = folder_ + "/other", path = folder_ + "/targets.json";
  ASSERT_TRUE(ReplaceFile(other, "theirs").ok());
  std::filesystem::create_symlink(other, path);
  ASSERT_TRUE(ReplaceFile(path, "ours").ok());
  EXPECT_EQ(Read(other), "theirs");
  EXPECT_FALSE(std::filesystem::is_symlink(path));
}

}  // namespace
}  // namespace minke::cli
