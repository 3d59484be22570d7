#include "libs/wire/messages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace minke::wire {
namespace {

using ::testing::HasSubstr;

constexpr RowShape kShape{
    .hidden = 24, .top_k = 3, .num_experts = 20, .num_groups = 5, .activation_bytes = 2};

// A message in memory of exactly its size, so that asan sees the first byte read behind it.
struct Message {
  FrameHeader header;
  size_t bytes;
  std::unique_ptr<std::byte[]> storage;

  explicit Message(size_t size) : bytes(size), storage(std::make_unique<std::byte[]>(size)) {
    header.payload_bytes = static_cast<uint32_t>(size);
  }
  std::span<std::byte> payload() { return {storage.get(), bytes}; }
};

std::vector<uint16_t> AscendingExperts(std::mt19937& random, int count) {
  std::vector<uint16_t> chosen;
  chosen.reserve(kShape.top_k);
  for (int expert = 0; expert < kShape.num_experts; ++expert) {
    const int missing = count - static_cast<int>(chosen.size());
    if (static_cast<int>(random() % (kShape.num_experts - expert)) < missing) {
      chosen.push_back(static_cast<uint16_t>(expert));
    }
  }
  return chosen;
}

void FillRandom(std::mt19937& random, std::byte* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<std::byte>(random());
}

Message RandomWork(std::mt19937& random) {
  const uint32_t rows = 1 + random() % 17;
  std::vector<WorkRow> work_rows;
  std::vector<WorkPair> pairs;
  for (uint32_t i = 0; i < rows; ++i) {
    const auto experts = AscendingExperts(random, 1 + random() % kShape.top_k);
    WorkRow row{.row = static_cast<uint32_t>(random())};
    row.set_pairs(pairs.size(), experts.size());
    work_rows.push_back(row);
    for (uint16_t expert : experts) pairs.push_back({.weight = 0.25f * expert - 1, .expert = expert});
  }
  Message message(WorkPayloadBytes(kShape, rows, pairs.size()));
  message.header.kind = Kind::kExpertWork;
  message.header.rows = rows;
  message.header.pairs = pairs.size();
  const WorkSpans spans = LayOutWork(kShape, rows, pairs.size(), message.payload());
  std::copy(work_rows.begin(), work_rows.end(), spans.rows.begin());
  std::copy(pairs.begin(), pairs.end(), spans.pairs.begin());
  FillRandom(random, spans.data, rows * kShape.row_bytes());
  return message;
}

Message RandomPartial(std::mt19937& random) {
  const uint32_t rows = 1 + random() % 17;
  Message message(PartialPayloadBytes(kShape, rows));
  message.header.kind = Kind::kPartial;
  message.header.rows = rows;
  const PartialSpans spans = LayOutPartial(kShape, rows, message.payload());
  for (PartialRow& row : spans.rows) {
    row = {.row = static_cast<uint32_t>(random()),
           .group = static_cast<uint16_t>(random() % kShape.num_groups)};
  }
  FillRandom(random, spans.data, rows * kShape.row_bytes());
  return message;
}

Message RandomRowList(std::mt19937& random, Kind kind) {
  const uint32_t rows = 1 + random() % 17;
  Message message(rows * sizeof(PartialRow));
  message.header.kind = kind;
  message.header.rows = rows;
  for (PartialRow& row : LayOutRowList(rows, message.payload())) {
    row = {.row = static_cast<uint32_t>(random()),
           .group = static_cast<uint16_t>(random() % kShape.num_groups)};
  }
  return message;
}

Message RandomRoutePlan(std::mt19937& random) {
  const uint32_t rows = 1 + random() % 17;
  const uint32_t servers = 1 + random() % 4;
  Message message(RoutePlanPayloadBytes(kShape, rows, servers));
  message.header.kind = Kind::kRoutePlan;
  message.header.rows = rows;
  message.header.pairs = servers;
  const RoutePlanSpans spans = LayOutRoutePlan(kShape, rows, servers, message.payload());
  for (uint64_t& server : spans.servers) server = 1 + random();
  for (uint32_t row = 0; row < rows; ++row) {
    const auto experts = AscendingExperts(random, kShape.top_k);
    for (int k = 0; k < kShape.top_k; ++k) {
      const size_t i = row * kShape.top_k + k;
      spans.weights[i] = 0.5f * k;
      spans.experts[i] = experts[k];
      spans.server_index[i] = random() % 5 == 0 ? kNoServer : static_cast<uint16_t>(random() % servers);
    }
  }
  return message;
}

Message RandomDispatch(std::mt19937& random) {
  const uint32_t rows = 1 + random() % 17;
  Message message(rows * kShape.row_bytes());
  message.header.kind = Kind::kDispatch;
  message.header.rows = rows;
  FillRandom(random, message.payload().data(), message.bytes);
  return message;
}

// Reads by kind, touching all that the view offers. True if accepted.
bool ReadAll(Message& message, uint64_t& sum) {
  const FrameHeader& header = message.header;
  const auto add = [&](const std::byte* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) sum += static_cast<uint8_t>(data[i]);
  };
  switch (header.kind) {
    case Kind::kDispatch: {
      const auto data = ReadDispatch(kShape, header, message.payload());
      if (data.ok()) add(*data, header.rows * kShape.row_bytes());
      return data.ok();
    }
    case Kind::kExpertWork: {
      const auto view = ReadWork(kShape, header, message.payload());
      if (!view.ok()) return false;
      for (const WorkRow& row : view->rows) {
        for (const WorkPair& pair : view->pairs.subspan(row.pairs_begin(), row.pairs_count)) {
          EXPECT_LT(pair.expert, kShape.num_experts);
          sum += pair.expert;
        }
      }
      add(view->data, view->rows.size() * kShape.row_bytes());
      return true;
    }
    case Kind::kPartial: {
      const auto view = ReadPartial(kShape, header, message.payload());
      if (!view.ok()) return false;
      for (const PartialRow& row : view->rows) EXPECT_LT(row.group, kShape.num_groups);
      add(view->data, view->rows.size() * kShape.row_bytes());
      return true;
    }
    case Kind::kNack:
    case Kind::kBusy:
    case Kind::kReject: {
      const auto view = ReadRowList(kShape, header, message.payload());
      if (!view.ok()) return false;
      for (const PartialRow& row : view->rows) sum += row.row;
      return true;
    }
    case Kind::kRoutePlan: {
      const auto view = ReadRoutePlan(kShape, header, message.payload());
      if (!view.ok()) return false;
      for (uint16_t index : view->server_index) {
        if (index != kNoServer) sum += view->servers[index];
      }
      for (uint16_t expert : view->experts) EXPECT_LT(expert, kShape.num_experts);
      for (float weight : view->weights) EXPECT_TRUE(std::isfinite(weight));
      return true;
    }
    default:
      return false;
  }
}

template <typename View>
void ExpectRefused(const absl::StatusOr<View>& view, const char* message) {
  ASSERT_FALSE(view.ok());
  EXPECT_EQ(view.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(view.status().message()), HasSubstr(message));
}

TEST(ReadWork, ReadsBackWhatWasWritten) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    Message message = RandomWork(random);
    const auto view = ReadWork(kShape, message.header, message.payload());
    ASSERT_TRUE(view.ok()) << view.status();
    EXPECT_EQ(view->rows.size(), message.header.rows);
    EXPECT_EQ(view->pairs.size(), message.header.pairs);
    EXPECT_EQ((view->data - message.payload().data()) % kRowAlignment, 0);
    EXPECT_EQ(view->data + message.header.rows * kShape.row_bytes(),
              message.payload().data() + message.bytes);
  }
}

TEST(ReadWork, PairsBeginUsesAll24Bits) {
  WorkRow row;
  row.set_pairs(0xabcdef, 6);
  EXPECT_EQ(row.pairs_begin(), 0xabcdefu);
  EXPECT_EQ(row.pairs_count, 6);
}

TEST(ReadWork, RefusesCountsThatDoNotMatchTheBytes) {
  std::mt19937 random(2);
  // (One pair more or less may hide in the padding; that is still inside the payload.)
  for (uint32_t FrameHeader::*field : {&FrameHeader::rows, &FrameHeader::pairs}) {
    for (uint32_t change : {64u, static_cast<uint32_t>(-64), 0x20000000u, 0x80000000u, 0xfffff000u}) {
      Message message = RandomWork(random);
      message.header.*field += change;
      EXPECT_FALSE(ReadWork(kShape, message.header, message.payload()).ok());
    }
  }
  Message message = RandomWork(random);
  ExpectRefused(ReadWork(kShape, message.header, message.payload().first(message.bytes - 1)), "received");
  message.header.payload_bytes -= 64;
  ExpectRefused(ReadWork(kShape, message.header, message.payload().first(message.bytes - 64)),
                "payload bytes");
}

TEST(ReadWork, RefusesBadDescriptors) {
  std::mt19937 random(3);
  const auto spoil = [&](const char* message_part, auto change) {
    Message message = RandomWork(random);
    const WorkSpans spans{
        {reinterpret_cast<WorkRow*>(message.payload().data()), message.header.rows},
        {reinterpret_cast<WorkPair*>(message.payload().data() + message.header.rows * sizeof(WorkRow)),
         message.header.pairs},
        nullptr};
    change(message, spans);
    ExpectRefused(ReadWork(kShape, message.header, message.payload()), message_part);
  };
  spoil("pairs of row", [](Message&, WorkSpans s) { s.rows[0].pairs_count = 0; });
  spoil("pairs of row", [](Message&, WorkSpans s) { s.rows[0].pairs_count = 4; });
  spoil("end of the pairs", [](Message& m, WorkSpans s) { s.rows[0].set_pairs(m.header.pairs, 1); });
  spoil("end of the pairs", [](Message&, WorkSpans s) { s.rows[0].set_pairs(0xffffff, 3); });
  spoil("expert", [](Message&, WorkSpans s) { s.pairs[0].expert = kShape.num_experts; });
  spoil("reserved", [](Message&, WorkSpans s) { s.pairs[0].reserved = 1; });
  spoil("finite", [](Message&, WorkSpans s) { s.pairs[0].weight = std::numeric_limits<float>::quiet_NaN(); });
  spoil("finite", [](Message&, WorkSpans s) { s.pairs[0].weight = std::numeric_limits<float>::infinity(); });
  spoil("unexpected kind", [](Message& m, WorkSpans) { m.header.kind = Kind::kPartial; });
  spoil("flags", [](Message& m, WorkSpans) { m.header.flags = 2; });
  spoil("rows", [](Message& m, WorkSpans) { m.header.rows = 0; });
}

TEST(ReadWork, RefusesDescendingAndRepeatedExperts) {
  Message message(WorkPayloadBytes(kShape, 1, 2));
  message.header.kind = Kind::kExpertWork;
  message.header.rows = 1;
  message.header.pairs = 2;
  const WorkSpans spans = LayOutWork(kShape, 1, 2, message.payload());
  spans.rows[0].set_pairs(0, 2);
  spans.pairs[0] = {.weight = 1, .expert = 5};
  spans.pairs[1] = {.weight = 1, .expert = 6};
  EXPECT_TRUE(ReadWork(kShape, message.header, message.payload()).ok());
  spans.pairs[1].expert = 5;
  ExpectRefused(ReadWork(kShape, message.header, message.payload()), "not ascending");
  spans.pairs[1].expert = 4;
  ExpectRefused(ReadWork(kShape, message.header, message.payload()), "not ascending");
}

TEST(ReadDispatch, RefusesWrongSizesFlagsAndRanges) {
  std::mt19937 random(4);
  Message message = RandomDispatch(random);
  const auto data = ReadDispatch(kShape, message.header, message.payload());
  ASSERT_TRUE(data.ok());
  EXPECT_EQ(*data, message.payload().data());
  ++message.header.rows;
  ExpectRefused(ReadDispatch(kShape, message.header, message.payload()), "payload bytes");
  --message.header.rows;
  message.header.pairs = 1;
  ExpectRefused(ReadDispatch(kShape, message.header, message.payload()), "pairs");
  message.header.pairs = 0;
  message.header.flags = 1;
  ExpectRefused(ReadDispatch(kShape, message.header, message.payload()), "flags");
  message.header.flags = 0;
  message.header.row_begin = UINT32_MAX - 0;
  ExpectRefused(ReadDispatch(kShape, message.header, message.payload()), "end of rows");
}

TEST(ReadPartial, RefusesBadGroupsAndSizes) {
  std::mt19937 random(5);
  Message message = RandomPartial(random);
  ASSERT_TRUE(ReadPartial(kShape, message.header, message.payload()).ok());
  auto* rows = reinterpret_cast<PartialRow*>(message.payload().data());
  rows[0].group = kShape.num_groups;
  ExpectRefused(ReadPartial(kShape, message.header, message.payload()), "group");
  rows[0].group = kWholeRow;
  ExpectRefused(ReadPartial(kShape, message.header, message.payload()), "group");
  rows[0].group = 0;
  rows[0].reserved = 1;
  ExpectRefused(ReadPartial(kShape, message.header, message.payload()), "reserved");
  rows[0].reserved = 0;
  message.header.rows += 1;
  ExpectRefused(ReadPartial(kShape, message.header, message.payload()), "payload bytes");
  message.header.rows = 0x8000'0000;
  ExpectRefused(ReadPartial(kShape, message.header, message.payload()), "payload bytes");
}

TEST(ReadRowList, WholeRowOnlyWhereItMeansSomething) {
  std::mt19937 random(6);
  const auto read = [&](Kind kind, uint8_t flags) {
    Message message = RandomRowList(random, kind);
    message.header.flags = flags;
    reinterpret_cast<PartialRow*>(message.payload().data())->group = kWholeRow;
    return ReadRowList(kShape, message.header, message.payload()).ok();
  };
  EXPECT_FALSE(read(Kind::kNack, 0));
  EXPECT_TRUE(read(Kind::kBusy, 0));
  EXPECT_FALSE(read(Kind::kReject, 0));
  EXPECT_FALSE(read(Kind::kBusy, 1));
}

TEST(ReadRoutePlan, RefusesBadTables) {
  std::mt19937 random(7);
  const auto spoil = [&](const char* part, auto change) {
    Message message = RandomRoutePlan(random);
    ASSERT_TRUE(ReadRoutePlan(kShape, message.header, message.payload()).ok());
    const RoutePlanSpans spans =
        LayOutRoutePlan(kShape, message.header.rows, message.header.pairs, message.payload());
    change(message, spans);
    ExpectRefused(ReadRoutePlan(kShape, message.header, message.payload()), part);
  };
  spoil("server [0]", [](Message&, RoutePlanSpans s) { s.servers[0] = 0; });
  spoil("expert", [](Message&, RoutePlanSpans s) { s.experts[2] = kShape.num_experts; });
  spoil("not ascending", [](Message&, RoutePlanSpans s) { s.experts[1] = s.experts[0]; });
  spoil("server index", [](Message& m, RoutePlanSpans s) { s.server_index[0] = m.header.pairs; });
  spoil("finite", [](Message&, RoutePlanSpans s) { s.weights[1] = -std::numeric_limits<float>::infinity(); });
  spoil("payload bytes", [](Message& m, RoutePlanSpans) { ++m.header.rows; });
  spoil("payload bytes", [](Message& m, RoutePlanSpans) { ++m.header.pairs; });
  spoil("number of servers", [](Message& m, RoutePlanSpans) { m.header.pairs = kNoServer; });
  spoil("number of servers", [](Message& m, RoutePlanSpans) { m.header.pairs = UINT32_MAX; });
  spoil("end of rows", [](Message& m, RoutePlanSpans) { m.header.row_begin = UINT32_MAX; });
}

TEST(ReadRoutePlan, ARejectedRowIsMarkedByItsFirstWeight) {
  std::mt19937 random(10);
  Message message = RandomRoutePlan(random);
  const RoutePlanSpans spans =
      LayOutRoutePlan(kShape, message.header.rows, message.header.pairs, message.payload());
  spans.weights[0] = kRejectedRowWeight;
  for (int k = 0; k < kShape.top_k; ++k) spans.server_index[k] = kNoServer;
  const auto view = ReadRoutePlan(kShape, message.header, message.payload());
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->weights[0], kRejectedRowWeight);
  // Only there: no gate gives negative weights.
  spans.weights[0] = -2;
  ExpectRefused(ReadRoutePlan(kShape, message.header, message.payload()), "weight [0]");
  spans.weights[0] = 0;
  spans.weights[1] = kRejectedRowWeight;
  ExpectRefused(ReadRoutePlan(kShape, message.header, message.payload()), "weight [1]");
}

TEST(Readers, FlippedBytesNeverReadOutOfBounds) {
  std::mt19937 random(8);
  uint64_t sum = 0;
  int accepted = 0, refused = 0;
  for (int round = 0; round < 20000; ++round) {
    Message message = [&] {
      switch (random() % 5) {
        case 0:
          return RandomWork(random);
        case 1:
          return RandomPartial(random);
        case 2:
          return RandomRowList(random, static_cast<Kind>(20 + random() % 3));
        case 3:
          return RandomRoutePlan(random);
        default:
          return RandomDispatch(random);
      }
    }();
    const int flips = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < flips; ++i) {
      const auto bit = static_cast<std::byte>(1u << random() % 8);
      if (random() % 2 == 0) {
        reinterpret_cast<std::byte*>(&message.header)[random() % 64] ^= bit;
      } else {
        // Mostly descriptors: they are what a reader believes.
        message.payload()[random() % std::min<size_t>(message.bytes, 200)] ^= bit;
      }
    }
    if (!ValidateHeader(message.header, message.bytes).ok() || !ReadAll(message, sum)) {
      ++refused;
    } else {
      ++accepted;
    }
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 1000);
  EXPECT_NE(sum, 0u);
}

TEST(Readers, TruncatedAndRandomPayloadsNeverReadOutOfBounds) {
  std::mt19937 random(9);
  uint64_t sum = 0;
  for (int round = 0; round < 20000; ++round) {
    Message message(random() % 300);
    FillRandom(random, message.payload().data(), message.bytes);
    message.header.kind = static_cast<Kind>(16 + random() % 7);
    message.header.flags = random() % 3;
    message.header.rows = random() % 4 == 0 ? static_cast<uint32_t>(random()) : random() % 8;
    message.header.pairs = random() % 4 == 0 ? static_cast<uint32_t>(random()) : random() % 8;
    ReadAll(message, sum);
  }
}

TEST(RowsMax, LargestMessageFitsAndOneRowMoreDoesNot) {
  for (int hidden : {16, 24, 48, 96, 2048, 5120, 7168}) {
    for (int activation_bytes : {2, 4}) {
      for (int top_k : {1, 3, 6, 8}) {
        const RowShape shape{hidden, top_k, 160, 8, activation_bytes};
        const auto fits = [](uint64_t bytes) { return bytes <= kPayloadBytesMax; };
        const uint32_t dispatch = DispatchRowsMax(shape);
        EXPECT_TRUE(dispatch >= 1 && fits(dispatch * shape.row_bytes()) &&
                    !fits((dispatch + 1) * shape.row_bytes()));
        const uint32_t work = WorkRowsMax(shape);
        EXPECT_TRUE(work >= 1 && fits(WorkPayloadBytes(shape, work, work * top_k)) &&
                    !fits(WorkPayloadBytes(shape, work + 1, (work + 1) * top_k)));
        const uint32_t partial = PartialRowsMax(shape);
        EXPECT_TRUE(partial >= 1 && fits(PartialPayloadBytes(shape, partial)) &&
                    !fits(PartialPayloadBytes(shape, partial + 1)));
        const uint32_t plan = RoutePlanRowsMax(shape);
        const uint32_t servers = std::min(top_k, 8);
        EXPECT_TRUE(plan >= 1 && fits(RoutePlanPayloadBytes(shape, plan, plan * servers)) &&
                    !fits(RoutePlanPayloadBytes(shape, plan + 1, (plan + 1) * servers)));
      }
    }
  }
}

TEST(LayOutWork, PaddingIsZero) {
  Message message(WorkPayloadBytes(kShape, 1, 1));
  std::memset(message.payload().data(), 0xee, message.bytes);
  const WorkSpans spans = LayOutWork(kShape, 1, 1, message.payload());
  for (const std::byte* p = message.payload().data() + 16; p != spans.data; ++p) EXPECT_EQ(*p, std::byte{0});
  EXPECT_EQ(spans.data, message.payload().data() + 64);
}

// ---- pages

FrameHeader PageHeader(Kind kind, uint32_t rows, uint32_t pairs, uint32_t row_begin, uint16_t layer = 0) {
  FrameHeader header;
  header.kind = kind;
  header.rows = rows;
  header.pairs = pairs;
  header.row_begin = row_begin;
  header.layer = layer;
  return header;
}

TEST(PageMessages, LargestAndSmallestAreRead) {
  alignas(8) static std::byte payload[kPayloadBytesMax];
  const auto bytes = [&](size_t count) { return std::span<const std::byte>(payload, count); };
  const auto all = ReadPageRequest(PageHeader(Kind::kPageRequest, 65536, 0, 1023), bytes(kPayloadBytesMax));
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->size(), 65536u);
  EXPECT_TRUE(ReadPageRequest(PageHeader(Kind::kPageRequest, 64, 0, 0), bytes(256)).ok());
  const auto over = ReadPageRequest(PageHeader(Kind::kPageRequest, 0, 0, 0), {});
  ASSERT_TRUE(over.ok());
  EXPECT_TRUE(over->empty());
  const PageShape shape{.layers = 60, .layer_bytes = 64 * 576 * 2};
  EXPECT_EQ(shape.LayersMax(), 3);
  EXPECT_TRUE(
      ReadPageTransfer(shape, PageHeader(Kind::kPageTransfer, 3, 1024, 1023, 57), bytes(3 * 64 * 576 * 2))
          .ok());
  EXPECT_TRUE(CheckPageEnd(PageHeader(Kind::kPageEnd, 0, 1024, 0), {}).ok());
  EXPECT_TRUE(CheckPageAck(PageHeader(Kind::kPageAck, 0, 0, 7), {}).ok());
}

TEST(PageMessages, LengthsAndIndicesThatDoNotFitAreRefused) {
  alignas(8) static std::byte payload[kPayloadBytesMax];
  const auto bytes = [&](size_t count) { return std::span<const std::byte>(payload, count); };
  const auto request = [&](uint32_t rows, uint32_t pairs, uint32_t first, size_t count) {
    return ReadPageRequest(PageHeader(Kind::kPageRequest, rows, pairs, first), bytes(count)).ok();
  };
  EXPECT_FALSE(request(63, 0, 0, 252));
  EXPECT_FALSE(request(64, 0, 0, 252));
  EXPECT_FALSE(request(64, 0, 1, 256));
  EXPECT_FALSE(request(64, 1, 0, 256));
  EXPECT_FALSE(request(0, 0, 1, 0));
  EXPECT_FALSE(request(65600, 0, 0, kPayloadBytesMax));
  EXPECT_FALSE(request(0x40000000, 0, 0, 0));  // 4 B x this is 0 in 32 bits
  const PageShape shape{.layers = 4, .layer_bytes = 1024};
  const auto transfer = [&](uint32_t rows, uint32_t pairs, uint32_t page, uint16_t layer, size_t count) {
    return ReadPageTransfer(shape, PageHeader(Kind::kPageTransfer, rows, pairs, page, layer), bytes(count))
        .ok();
  };
  EXPECT_TRUE(transfer(4, 1, 0, 0, 4096));
  EXPECT_FALSE(transfer(4, 1, 0, 1, 4096));
  EXPECT_FALSE(transfer(0xffffffff, 1, 0, 1, 0));
  EXPECT_FALSE(transfer(1, 1, 0, 4, 1024));
  EXPECT_FALSE(transfer(0, 1, 0, 0, 0));
  EXPECT_FALSE(transfer(1, 1, 1, 0, 1024));
  EXPECT_FALSE(transfer(1, 1025, 0, 0, 1024));
  EXPECT_FALSE(transfer(1, 1, 0, 0, 1023));
  EXPECT_FALSE(CheckPageEnd(PageHeader(Kind::kPageEnd, 0, 1025, 0), {}).ok());
  EXPECT_FALSE(CheckPageEnd(PageHeader(Kind::kPageEnd, 0, 3, 0), bytes(1)).ok());
  EXPECT_FALSE(CheckPageAck(PageHeader(Kind::kPageAck, 1, 0, 0), {}).ok());
  EXPECT_FALSE(CheckPageAck(PageHeader(Kind::kPageAck, 0, 0, 0), bytes(8)).ok());
}

// ---- units

TEST(UnitMessages, LengthsAndIndicesThatDoNotFitAreRefused) {
  alignas(8) static std::byte payload[kPayloadBytesMax];
  const auto bytes = [&](size_t count) { return std::span<const std::byte>(payload, count); };
  const auto request = [&](uint32_t pieces, uint32_t pairs, size_t count) {
    return ReadUnitRequest(PageHeader(Kind::kUnitRequest, pieces, pairs, 5), bytes(count)).ok();
  };
  EXPECT_TRUE(request(1, 0, 8));
  EXPECT_TRUE(request(kUnitPiecesMax, 0, 8));
  EXPECT_FALSE(request(0, 0, 8));
  EXPECT_FALSE(request(kUnitPiecesMax + 1, 0, 8));
  EXPECT_FALSE(request(1, 1, 8));
  EXPECT_FALSE(request(1, 0, 7));
  EXPECT_FALSE(request(1, 0, 0));
  payload[0] = std::byte{0x12};
  payload[7] = std::byte{0x34};
  EXPECT_EQ(*ReadUnitRequest(PageHeader(Kind::kUnitRequest, 1, 0, 0), bytes(8)), 0x3400000000000012u);

  const int64_t two = kUnitPieceBytes + 100;
  const auto piece = [&](uint32_t index, uint32_t pieces, size_t count, uint32_t rows = 1) {
    return CheckUnitPiece(two, PageHeader(Kind::kUnitPiece, rows, pieces, index), bytes(count)).ok();
  };
  EXPECT_TRUE(piece(0, 2, kUnitPieceBytes));
  EXPECT_TRUE(piece(1, 2, 100));
  EXPECT_FALSE(piece(0, 2, 100));
  EXPECT_FALSE(piece(1, 2, 101));
  EXPECT_FALSE(piece(1, 2, 0));
  EXPECT_FALSE(piece(2, 2, 100));
  EXPECT_FALSE(piece(0xffffffff, 2, 100));
  EXPECT_FALSE(piece(1, 3, 100));
  EXPECT_FALSE(piece(0, 2, kUnitPieceBytes, 2));
  EXPECT_TRUE(
      CheckUnitPiece(kUnitPieceBytes, PageHeader(Kind::kUnitPiece, 1, 1, 0), bytes(kUnitPieceBytes)).ok());

  EXPECT_TRUE(CheckUnitAbsent(PageHeader(Kind::kUnitAbsent, 0, 0, 0), {}).ok());
  EXPECT_FALSE(CheckUnitAbsent(PageHeader(Kind::kUnitAbsent, 1, 0, 0), {}).ok());
  EXPECT_FALSE(CheckUnitAbsent(PageHeader(Kind::kUnitAbsent, 0, 0, 0), bytes(1)).ok());
}

// ---- Rows apart from their descriptors
// ------------------------------------------------------------------------

TEST(RowDataOffsetOf, IsWhereTheWriterPutsTheRows) {
  for (uint32_t rows : {1u, 7u, 8u, 9u, 100u}) {
    FrameHeader header;
    header.rows = rows;
    header.pairs = 2 * rows;
    header.kind = Kind::kExpertWork;
    header.payload_bytes = WorkPayloadBytes(kShape, rows, header.pairs);
    Message work(header.payload_bytes);
    const std::byte* data = LayOutWork(kShape, rows, header.pairs, work.payload()).data;
    EXPECT_EQ(RowDataOffsetOf(header), data - work.payload().data());
    header.kind = Kind::kPartial;
    header.payload_bytes = PartialPayloadBytes(kShape, rows);
    Message partial(header.payload_bytes);
    data = LayOutPartial(kShape, rows, partial.payload()).data;
    EXPECT_EQ(RowDataOffsetOf(header), data - partial.payload().data());
    header.kind = Kind::kDispatch;
    EXPECT_EQ(RowDataOffsetOf(header), 0u);
    for (const Kind kind : {Kind::kRoutePlan, Kind::kNack, Kind::kUnitPiece, Kind::kHello, Kind{99}}) {
      header.kind = kind;
      EXPECT_EQ(RowDataOffsetOf(header), std::nullopt);
    }
  }
}

TEST(RowDataOffsetOf, CountsThatDoNotFitHaveNone) {
  FrameHeader header;
  header.kind = Kind::kPartial;
  header.rows = 9;  // 72 bytes, padded to 128
  header.payload_bytes = 127;
  EXPECT_EQ(RowDataOffsetOf(header), std::nullopt);
  header.payload_bytes = 128;
  EXPECT_EQ(RowDataOffsetOf(header), 128u);
  header.rows = UINT32_MAX;
  EXPECT_EQ(RowDataOffsetOf(header), std::nullopt);
  header.kind = Kind::kExpertWork;
  header.rows = header.pairs = 0x20000000;  // 8 bytes each: 0 in 32 bits
  EXPECT_EQ(RowDataOffsetOf(header), std::nullopt);
}

TEST(ReadHead, TakesDescriptorsOfTheRightLengthOnly) {
  FrameHeader header;
  header.kind = Kind::kPartial;
  header.rows = 9;
  header.payload_bytes = PartialPayloadBytes(kShape, 9);
  const uint32_t offset = *RowDataOffsetOf(header);
  ASSERT_EQ(offset, 128u);
  const auto read = [&](size_t descriptor_bytes, size_t data_bytes) {
    std::vector<std::byte> head(sizeof(header) + descriptor_bytes);
    std::memcpy(head.data(), &header, std::min(sizeof(header), head.size()));
    return ReadHead(head, data_bytes);
  };
  const uint32_t rows_bytes = header.payload_bytes - offset;
  ASSERT_TRUE(read(0, header.payload_bytes).ok());
  ASSERT_TRUE(read(offset, rows_bytes).ok());
  EXPECT_EQ(read(offset, rows_bytes)->rows, 9u);
  for (size_t part = 1; part <= header.payload_bytes; ++part)
    EXPECT_EQ(read(part, header.payload_bytes - part).ok(), part == offset) << part;
  EXPECT_FALSE(read(offset, rows_bytes - 1).ok());
  EXPECT_FALSE(read(offset, rows_bytes + 1).ok());
  EXPECT_FALSE(read(offset, SIZE_MAX - offset + 1 + rows_bytes).ok());  // the sum is right in 64 bits
  EXPECT_FALSE(read(size_t{kPayloadBytesMax} + 1, 0).ok());
  EXPECT_FALSE(ReadHead({}, 0).ok());
  std::vector<std::byte> head(sizeof(header) - 1);
  EXPECT_FALSE(ReadHead(head, 0).ok());

  header.version = 1;  // knows no rows apart
  EXPECT_TRUE(read(0, header.payload_bytes).ok());
  EXPECT_FALSE(read(offset, rows_bytes).ok());
  header.version = kVersion;
  header.kind = Kind::kRoutePlan;  // has no rows
  EXPECT_TRUE(read(0, header.payload_bytes).ok());
  EXPECT_FALSE(read(offset, rows_bytes).ok());
  header.kind = Kind::kHello;
  EXPECT_FALSE(read(offset, rows_bytes).ok());
}

}  // namespace
}  // namespace minke::wire
