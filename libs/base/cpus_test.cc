#include "libs/base/cpus.h"

#include <sched.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "gtest/gtest.h"

namespace minke {
namespace {

TEST(Cpus, WhatIsNoListIsRefused) {
  for (const char* list : {"", ",", "1,", "a", "3-1", "-1", "1-", "0-99999", "1 2"}) {
    EXPECT_EQ(ParseCpus(list).status().code(), absl::StatusCode::kInvalidArgument) << list;
  }
}

TEST(Cpus, ListsAreAscendingWithoutRepetitions) {
  EXPECT_EQ(*ParseCpus("7"), std::vector<int>({7}));
  EXPECT_EQ(*ParseCpus("8,0-3,2"), std::vector<int>({0, 1, 2, 3, 8}));
}

TEST(Cpus, ThreadsStartedAfterwardsStayThere) {
  std::thread([] {
    cpu_set_t allowed;
    ASSERT_EQ(sched_getaffinity(0, sizeof allowed, &allowed), 0);
    int cpu = 0;
    while (!CPU_ISSET(cpu, &allowed)) ++cpu;
    ASSERT_TRUE(RunOnCpus(std::to_string(cpu)).ok());
    EXPECT_EQ(UsableCpus(), 1);
    std::thread([cpu] { EXPECT_EQ(sched_getcpu(), cpu); }).join();
    EXPECT_FALSE(RunOnCpus(std::to_string(CPU_SETSIZE - 1)).ok());
  }).join();
}

TEST(Cpus, NodesWithCpusAreFoundInOrder) {
  const std::string root = testing::TempDir() + "/numa_nodes";
  std::filesystem::remove_all(root);
  const auto node = [&](const std::string& name, const std::string& list) {
    std::filesystem::create_directories(root + "/" + name);
    std::ofstream(root + "/" + name + "/cpulist") << list << "\n";
  };
  EXPECT_TRUE(NumaNodes(root).empty());
  node("node10", "24-31");
  node("node2", "");  // memory only
  node("node0", "0-7,16-23");
  node("power", "1");
  EXPECT_EQ(NumaNodes(root), std::vector<std::string>({"0-7,16-23", "24-31"}));
}

}  // namespace
}  // namespace minke
