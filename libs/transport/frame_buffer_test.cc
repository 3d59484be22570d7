#include "libs/transport/frame_buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "libs/transport/testing/host_row_memory.h"

namespace minke::transport {
namespace {

TEST(FramePool, FrameHasTheSmallestCapacityThatFits) {
  FramePool pool;
  EXPECT_EQ(pool.Allocate(0).capacity(), 1024u);
  EXPECT_EQ(pool.Allocate(1024).capacity(), 1024u);
  EXPECT_EQ(pool.Allocate(1025).capacity(), 4096u);
  EXPECT_EQ(pool.Allocate(16384).capacity(), 16384u);
  EXPECT_EQ(pool.Allocate(16385).capacity(), 65536u);
  EXPECT_EQ(pool.Allocate(wire::kPayloadBytesMax).capacity(), wire::kPayloadBytesMax);
}

TEST(FramePool, PayloadIsAlignedAndHeaderIsFresh) {
  FramePool pool;
  for (int round = 0; round < 3; ++round) {
    FrameRef frame = pool.Allocate(777);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(frame.payload()) % 64, 0u);
    EXPECT_EQ(frame.header().payload_bytes, 777u);
    EXPECT_EQ(frame.header().rows, 0u);
    EXPECT_EQ(frame.header().magic, wire::kMagic);
    EXPECT_EQ(frame.payload_span().size(), 777u);
    frame.header().rows = 9;
    std::memset(frame.payload(), 0xab, frame.capacity());
  }
}

TEST(FramePool, LastReferenceReturnsTheFrame) {
  FramePool pool;
  FrameRef first = pool.Allocate(100);
  FrameRef second = first;
  EXPECT_EQ(pool.frames_in_use(), 1);
  first = FrameRef();
  EXPECT_EQ(pool.frames_in_use(), 1);
  FrameRef moved = std::move(second);
  EXPECT_FALSE(second);  // NOLINT: the moved-from state is part of the contract
  moved = FrameRef();
  EXPECT_EQ(pool.frames_in_use(), 0);
  internal::FrameBlock* detached = pool.Allocate(1).Detach();
  EXPECT_EQ(pool.frames_in_use(), 1);
  FrameRef taken_back(detached);
  taken_back = FrameRef();
  EXPECT_EQ(pool.frames_in_use(), 0);
}

TEST(FramePool, SteadyStateAllocatesNothing) {
  FramePool pool;
  std::mt19937 random(1);
  const auto churn = [&] {
    std::vector<FrameRef> held;
    for (uint32_t bytes : {0u, 3000u, 9000u, 60000u, 262144u}) {
      for (int i = 0; i < 20; ++i) held.push_back(pool.Allocate(bytes));
    }
    std::shuffle(held.begin(), held.end(), random);
  };
  churn();
  const int64_t high_water = pool.allocated_bytes();
  for (int i = 0; i < 100; ++i) churn();
  EXPECT_EQ(pool.allocated_bytes(), high_water);
  EXPECT_EQ(pool.frames_in_use(), 0);
}

TEST(FramePool, FramesMayOutliveThePool) {
  FrameRef survivor;
  {
    FramePool pool;
    survivor = pool.Allocate(5000);
  }
  std::memset(survivor.payload(), 1, 5000);
}

TEST(FramePool, ThreadsMayAllocateAndReleaseEachOthersFrames) {
  FramePool pool;
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::vector<FrameRef> shared;
  for (uint32_t id = 0; id < 4; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 random(id);
      for (int i = 0; i < 5000; ++i) {
        FrameRef frame = pool.Allocate(random() % 5000);
        std::memset(frame.payload(), static_cast<int>(id), frame.header().payload_bytes);
        FrameRef other;
        const std::lock_guard lock(mutex);
        shared.push_back(frame);
        if (shared.size() > 16) {
          std::swap(other, shared[random() % shared.size()]);
          std::swap(shared.back(), other);
          shared.pop_back();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  shared.clear();
  EXPECT_EQ(pool.frames_in_use(), 0);
}

// ---- Rows in row memory
// ---------------------------------------------------------------------------------------

TEST(RowMemory, BlocksAreTakenOnceAndRowsHaveNumbers) {
  HostRowMemory memory(/*row_bytes=*/32, /*rows_per_block=*/4, /*blocks=*/3);
  EXPECT_EQ(memory.bytes(), 3 * 4 * 32);
  std::set<std::byte*> blocks;
  for (int i = 0; i < 3; ++i) {
    std::byte* const block = memory.TakeBlock();
    ASSERT_NE(block, nullptr);
    EXPECT_EQ(memory.RowNumber(block) % 4, 0);
    EXPECT_EQ(memory.RowNumber(block + 3 * 32), memory.RowNumber(block) + 3);
    EXPECT_TRUE(blocks.insert(block).second);
  }
  EXPECT_EQ(*blocks.begin(), memory.base());
  EXPECT_EQ(memory.blocks_free(), 0);
  EXPECT_EQ(memory.TakeBlock(), nullptr);
  memory.ReturnBlock(*blocks.rbegin());
  EXPECT_EQ(memory.TakeBlock(), *blocks.rbegin());
  EXPECT_TRUE(memory.Fits(4, 4 * 32));
  EXPECT_FALSE(memory.Fits(5, 5 * 32));
  EXPECT_FALSE(memory.Fits(4, 3 * 32));
  EXPECT_FALSE(memory.Fits(0, 0));
}

TEST(FramePool, ABlockGoesBackWithTheLastReferenceAndTheNextFrameHasNone) {
  HostRowMemory memory(32, 4, 1);
  FramePool pool;
  FrameRef frame = pool.AllocateWithRows(64 + 3 * 32, 64, memory);
  ASSERT_TRUE(frame);
  EXPECT_EQ(frame.device_rows(), memory.base());
  EXPECT_EQ(frame.rows_offset(), 64u);
  EXPECT_EQ(frame.row_memory(), &memory);
  EXPECT_EQ(frame.payload_span().size(), 64u + 3 * 32);
  EXPECT_FALSE(pool.AllocateWithRows(64, 64, memory)) << "all blocks are in use";
  EXPECT_EQ(pool.frames_in_use(), 1);
  FrameRef second = frame;
  frame = FrameRef();
  EXPECT_EQ(memory.blocks_free(), 0);
  second = FrameRef();
  EXPECT_EQ(memory.blocks_free(), 1);
  frame = pool.Allocate(64 + 3 * 32);  // the same memory again
  EXPECT_EQ(frame.device_rows(), nullptr);
  EXPECT_EQ(frame.row_memory(), nullptr);
}

TEST(FramePool, ACopyInHostMemorySaysTheSame) {
  HostRowMemory memory(32, 4, 1);
  FramePool pool;
  FrameRef frame = pool.AllocateWithRows(64 + 4 * 32, 64, memory);
  frame.header().kind = wire::Kind::kPartial;
  frame.header().rows = 4;
  for (int i = 0; i < 64; ++i) frame.payload()[i] = static_cast<std::byte>(i);
  for (int i = 0; i < 4 * 32; ++i) frame.device_rows()[i] = static_cast<std::byte>(64 + i);
  const absl::StatusOr<FrameRef> copy = pool.CopyToHost(frame);
  ASSERT_TRUE(copy.ok()) << copy.status();
  EXPECT_EQ(copy->device_rows(), nullptr);
  EXPECT_EQ(copy->header().kind, wire::Kind::kPartial);
  EXPECT_EQ(copy->header().rows, 4u);
  ASSERT_EQ(copy->payload_span().size(), 64u + 4 * 32);
  for (int i = 0; i < 64 + 4 * 32; ++i) ASSERT_EQ(copy->payload()[i], static_cast<std::byte>(i)) << i;
}

}  // namespace
}  // namespace minke::transport
