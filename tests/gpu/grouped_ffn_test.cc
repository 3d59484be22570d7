#include "libs/kernels/cuda/grouped_ffn.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

struct Form {
  Path path;
  FfnFormat format;
  int variant;
};

struct Experts {
  GroupedFfnShape shape;
  std::vector<bf16> gate, up, down;  // [experts, inner, hidden], down [experts, hidden, inner]
};

Experts RandomExperts(std::mt19937& rng, const GroupedFfnShape& shape) {
  const int64_t count = int64_t{shape.experts} * shape.hidden * shape.inner;
  const float in = 1.f / std::sqrt(static_cast<float>(shape.hidden)),
              out = 1.f / std::sqrt(static_cast<float>(shape.inner));
  return {shape, RandomBF16(rng, count, 1.5f * in), RandomBF16(rng, count, 1.5f * in),
          RandomBF16(rng, count, out)};
}

// e4m3 of a finite value: four significant bits down to 2^-6, multiples of 2^-9 below, to nearest, ties to
// even.
double RoundE4M3(double value) {
  if (value == 0) return 0;
  const int exponent = std::max(std::ilogb(value), -6);
  return std::clamp(std::ldexp(std::nearbyint(std::ldexp(value, 3 - exponent)), exponent - 3), -448.0, 448.0);
}

// What the header says of FfnFormat::kFP8, for one matrix.
void RoundToFP8(bf16* matrix, int rows, int columns) {
  for (int r = 0; r < rows; r += 128) {
    for (int c = 0; c < columns; c += 128) {
      float largest = 0;
      const auto each = [&](auto body) {
        for (int i = r; i < std::min(rows, r + 128); ++i) {
          for (int j = c; j < std::min(columns, c + 128); ++j) body(matrix[int64_t{i} * columns + j]);
        }
      };
      each([&](bf16& x) { largest = std::max(largest, std::abs(BF16ToF32(x))); });
      if (largest == 0) continue;
      const double scale = [&] {
        int exponent;
        const double fraction = std::frexp(largest * (1.f / 448.f), &exponent);
        return std::ldexp(std::ceil(fraction * 16) / 16, exponent);
      }();
      each([&](bf16& x) {
        x = F32ToBF16(static_cast<float>(RoundE4M3(BF16ToF32(x) / static_cast<float>(scale)) * scale));
      });
    }
  }
}

Experts Rounded(Experts experts) {
  const auto [count, hidden, inner] = experts.shape;
  const int64_t size = int64_t{hidden} * inner;
  ParallelFor(count, [&, hidden = hidden, inner = inner](int64_t e) {
    RoundToFP8(&experts.gate[e * size], inner, hidden);
    RoundToFP8(&experts.up[e * size], inner, hidden);
    RoundToFP8(&experts.down[e * size], hidden, inner);
  });
  return experts;
}

struct Work {
  int slots;
  int outputs;                   // capacity
  int used = -1;                 // < 0: no counter is given
  std::vector<int32_t> experts;  // [outputs, slots]
  std::vector<int32_t> source;   // empty: output i has row i
  int x_rows;
};

// Every output has up to `pairs` distinct experts out of those that `pick` draws, in random slots.
template <class Pick>
Work RandomWork(std::mt19937& rng, int outputs, int slots, int pairs, Pick pick) {
  Work work{.slots = slots, .outputs = outputs, .x_rows = outputs};
  work.experts.assign(outputs * slots, -1);
  for (int i = 0; i < outputs; ++i) {
    std::vector<int32_t> chosen;
    for (int n = 0; n < pairs; ++n) {
      const int expert = pick(rng);
      if (std::find(chosen.begin(), chosen.end(), expert) == chosen.end()) chosen.push_back(expert);
    }
    std::vector<int> slot(slots);
    std::iota(slot.begin(), slot.end(), 0);
    std::shuffle(slot.begin(), slot.end(), rng);
    for (size_t n = 0; n < chosen.size(); ++n) work.experts[i * slots + slot[n]] = chosen[n];
  }
  return work;
}

// Of every output, in double precision.
std::vector<double> Reference(const Experts& experts, const Work& work, const std::vector<bf16>& x,
                              const std::vector<float>& slot_weights) {
  const auto [count, hidden, inner] = experts.shape;
  const int used = work.used < 0 ? work.outputs : work.used;
  const int64_t size = int64_t{hidden} * inner;
  std::vector<double> want(int64_t{work.outputs} * hidden);
  struct Pair {
    int output, slot, expert;
  };
  std::vector<Pair> pairs;
  for (int i = 0; i < used; ++i) {
    for (int k = 0; k < work.slots; ++k) {
      const int expert = work.experts[i * work.slots + k];
      if (expert >= 0 && expert < count) pairs.push_back({i, k, expert});
    }
  }
  std::vector<std::vector<double>> results(pairs.size());
  ParallelFor(std::ssize(pairs), [&, hidden = hidden, inner = inner](int64_t at) {
    const Pair& pair = pairs[at];
    const bf16* row = &x[int64_t{work.source.empty() ? pair.output : work.source[pair.output]} * hidden];
    std::vector<float> in(hidden), middle(inner);
    for (int j = 0; j < hidden; ++j) in[j] = BF16ToF32(row[j]);
    for (int i = 0; i < inner; ++i) {
      const bf16* gate = &experts.gate[pair.expert * size + int64_t{i} * hidden];
      const bf16* up = &experts.up[pair.expert * size + int64_t{i} * hidden];
      double g = 0, u = 0;
      for (int j = 0; j < hidden; ++j) {
        g += double{in[j]} * BF16ToF32(gate[j]);
        u += double{in[j]} * BF16ToF32(up[j]);
      }
      middle[i] = static_cast<float>(g / (1 + std::exp(-g)) * u);
    }
    results[at].resize(hidden);
    for (int j = 0; j < hidden; ++j) {
      const bf16* down = &experts.down[pair.expert * size + int64_t{j} * inner];
      double sum = 0;
      for (int i = 0; i < inner; ++i) sum += double{middle[i]} * BF16ToF32(down[i]);
      results[at][j] = sum;
    }
  });
  for (size_t at = 0; at < pairs.size(); ++at) {
    const double weight = slot_weights[pairs[at].output * work.slots + pairs[at].slot];
    for (int j = 0; j < hidden; ++j) want[int64_t{pairs[at].output} * hidden + j] += weight * results[at][j];
  }
  return want;
}

// Expert by expert: even ones from the host, odd ones from the device.
GroupedFfnWeights Load(const Experts& experts, FfnFormat format, const Stream& stream) {
  auto weights = GroupedFfnWeights::Create(experts.shape, format);
  EXPECT_TRUE(weights.ok()) << weights.status();
  const int64_t size = int64_t{experts.shape.hidden} * experts.shape.inner;
  DeviceBuffer staging, gate, up, down;
  for (int e = 0; e < experts.shape.experts; ++e) {
    const bf16 *g = &experts.gate[e * size], *u = &experts.up[e * size], *d = &experts.down[e * size];
    absl::Status loaded;
    if (e % 2 == 0) {
      loaded = weights->Upload(e, g, u, d, staging, stream);
    } else {
      gate = ToDevice(std::vector<bf16>(g, g + size), stream);
      up = ToDevice(std::vector<bf16>(u, u + size), stream);
      down = ToDevice(std::vector<bf16>(d, d + size), stream);
      loaded = weights->Load(e, gate.as<bf16>(), up.as<bf16>(), down.as<bf16>(), stream);
      EXPECT_TRUE(stream.Synchronize().ok());
    }
    EXPECT_TRUE(loaded.ok()) << loaded;
  }
  EXPECT_TRUE(stream.Synchronize().ok());
  return *std::move(weights);
}

class GroupedFfnTest : public testing::TestWithParam<Form> {
 protected:
  void SetUp() override {
    if (GetParam().path == Path::kHopper && !CurrentDevice()->hopper()) GTEST_SKIP() << "no sm_90 device";
    auto stream = Stream::Create();
    ASSERT_TRUE(stream.ok()) << stream.status();
    stream_.emplace(*std::move(stream));
  }

  // For the weights that this form computes with.
  Experts Effective(const Experts& experts) const {
    return GetParam().format == FfnFormat::kFP8 ? Rounded(experts) : experts;
  }

  GroupedFfn Make(const GroupedFfnShape& shape, int slots, int outputs_max) const {
    auto ffn = GroupedFfn::Create({.shape = shape,
                                   .format = GetParam().format,
                                   .slots = slots,
                                   .outputs_max = outputs_max,
                                   .path = GetParam().path,
                                   .variant = GetParam().variant});
    EXPECT_TRUE(ffn.ok()) << ffn.status();
    return *std::move(ffn);
  }

  // Both output forms against the reference; rows past the used ones stay as they were.
  void Check(GroupedFfn& ffn, const GroupedFfnWeights& weights, const Experts& effective, const Work& work,
             uint32_t seed, int repeats = 0) {
    SCOPED_TRACE(testing::Message() << "experts " << effective.shape.experts << ", hidden "
                                    << effective.shape.hidden << ", inner " << effective.shape.inner
                                    << ", outputs " << work.outputs << ", used " << work.used << ", slots "
                                    << work.slots << ", seed " << seed);
    std::mt19937 rng(seed);
    const int hidden = effective.shape.hidden, used = work.used < 0 ? work.outputs : work.used;
    const auto x = RandomBF16(rng, int64_t{work.x_rows} * hidden);
    std::vector<float> slot_weights(work.outputs * work.slots);
    std::uniform_real_distribution<float> uniform(0.1f, 1.f);
    for (float& w : slot_weights) w = uniform(rng);
    const std::vector<double> want = Reference(effective, work, x, slot_weights);

    const DeviceBuffer x_device = ToDevice(x, *stream_), experts = ToDevice(work.experts, *stream_),
                       source = ToDevice(work.source, *stream_),
                       weights_device = ToDevice(slot_weights, *stream_),
                       used_device = ToDevice(std::vector<int32_t>{work.used}, *stream_);
    GroupedFfnArgs args;
    args.weights = &weights;
    args.x = x_device.as<bf16>();
    args.outputs = work.outputs;
    args.outputs_used = work.used < 0 ? nullptr : used_device.as<int32_t>();
    args.source = work.source.empty() ? nullptr : source.as<int32_t>();
    args.experts = experts.as<int32_t>();
    args.slot_weights = weights_device.as<float>();
    const auto run = [&](const GroupedFfnArgs& with) {
      const absl::Status status = ffn.Run(with, *stream_);
      EXPECT_TRUE(status.ok()) << status;
    };

    const auto partial = [&] {
      const DeviceBuffer out = Poisoned(int64_t{work.outputs} * hidden * 2, *stream_),
                         finite = Poisoned(work.outputs, *stream_);
      GroupedFfnArgs with = args;
      with.partial = out.as<bf16>();
      with.finite = finite.as<uint8_t>();
      run(with);
      const auto flags = ToHost<uint8_t>(finite, *stream_);
      for (int i = 0; i < work.outputs; ++i)
        EXPECT_EQ(flags[i], i < used ? 1 : 0xff) << "finite, output " << i;
      return ToHost<bf16>(out, *stream_);
    };
    const std::vector<bf16> got = partial();
    if (HasFailure()) return;
    for (int64_t i = int64_t{used} * hidden; i < std::ssize(got); ++i) {
      ASSERT_EQ(got[i], 0xffff) << "unused output " << i / hidden;
    }
    ExpectRows(std::vector<double>(got.size()), got, want, used, hidden, "partial");

    std::vector<float> before(got.size());
    for (float& v : before) v = uniform(rng);
    DeviceBuffer residual = ToDevice(before, *stream_);
    GroupedFfnArgs with = args;
    with.x_residual = residual.as<float>();
    run(with);
    const auto after = ToHost<float>(residual, *stream_);
    std::vector<double> difference(after.size());
    for (size_t i = 0; i < after.size(); ++i) difference[i] = double{after[i]} - before[i];
    for (int64_t i = int64_t{used} * hidden; i < std::ssize(got); ++i) {
      ASSERT_EQ(after[i], before[i]) << "unused output " << i / hidden;
    }
    ExpectRows(difference, {}, want, used, hidden, "residual");

    for (int i = 0; i < repeats && !HasFailure(); ++i) {
      ExpectSameBits(partial(), got, hidden, "repeat " + std::to_string(i));
    }
  }

  // Rows without a pair must be zero exactly; the others are compared.
  static void ExpectRows(std::vector<double> got, const std::vector<bf16>& got_bf16,
                         const std::vector<double>& want, int rows, int hidden, const std::string& what) {
    for (size_t i = 0; i < got_bf16.size(); ++i) got[i] = BF16ToF32(got_bf16[i]);
    double error = 0, norm = 0, worst = 0;
    int worst_row = -1;
    for (int row = 0; row < rows; ++row) {
      double row_error = 0, row_norm = 0;
      for (int64_t i = int64_t{row} * hidden; i < int64_t{row + 1} * hidden; ++i) {
        row_error += (got[i] - want[i]) * (got[i] - want[i]);
        row_norm += want[i] * want[i];
      }
      error += row_error, norm += row_norm;
      if (row_norm == 0) {
        EXPECT_EQ(row_error, 0) << what << ": row " << row << " has no pairs";
        continue;
      }
      const double relative = std::sqrt(row_error / row_norm);
      if (!(relative <= worst)) worst = relative, worst_row = row;
      if (std::isnan(relative)) break;
    }
    EXPECT_LE(worst, 1e-2) << what << ", row " << worst_row << " of " << rows;
    if (norm > 0) {
      EXPECT_LE(std::sqrt(error / norm), 5e-3) << what;
    }
  }

  std::optional<Stream> stream_;
};

constexpr GroupedFfnShape kShapes[] = {{1, 24, 40}, {3, 64, 64}, {5, 136, 72}, {4, 256, 192}, {8, 384, 200}};

TEST_P(GroupedFfnTest, NoPairsAtAll) {
  std::mt19937 rng(1);
  const Experts experts = RandomExperts(rng, {3, 64, 64});
  const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
  GroupedFfn ffn = Make(experts.shape, 6, 16);
  Work work{.slots = 6, .outputs = 16, .x_rows = 16};
  work.experts.assign(16 * 6, -1);
  Check(ffn, weights, Effective(experts), work, 2);
  work.experts[7] = 3;  // no such expert
  work.experts[9] = INT32_MIN;
  Check(ffn, weights, Effective(experts), work, 3);
  work.used = 0;
  Check(ffn, weights, Effective(experts), work, 4);
}

TEST_P(GroupedFfnTest, OneRow) {
  std::mt19937 rng(5);
  for (const GroupedFfnShape& shape : kShapes) {
    const Experts experts = RandomExperts(rng, shape);
    const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
    GroupedFfn ffn = Make(shape, 2, 1);
    Work work{.slots = 2, .outputs = 1, .x_rows = 1};
    work.experts = {-1, shape.experts - 1};
    Check(ffn, weights, Effective(experts), work, 6, 3);
    if (HasFailure()) return;
  }
}

// One expert has all rows, their number on either side of every tile.
TEST_P(GroupedFfnTest, RowsAroundATile) {
  std::mt19937 rng(7);
  const Experts experts = RandomExperts(rng, {3, 192, 136});
  const Experts effective = Effective(experts);
  const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
  GroupedFfn ffn = Make(experts.shape, 1, 700);
  for (const int rows : {1,   2,   7,   8,   9,   15,  16,  17,  31,  32,  33,  47,  63,  64,  65, 100,
                         127, 128, 129, 136, 192, 255, 256, 257, 300, 384, 385, 511, 512, 513, 700}) {
    Work work{.slots = 1, .outputs = rows, .x_rows = rows};
    work.experts.assign(rows, 1);
    Check(ffn, weights, effective, work, rows, 2);
    if (HasFailure()) return;
  }
}

TEST_P(GroupedFfnTest, RandomRaggedCounts) {
  std::mt19937 rng(9);
  for (const GroupedFfnShape& shape : kShapes) {
    const Experts experts = RandomExperts(rng, shape);
    const Experts effective = Effective(experts);
    const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
    for (const int outputs : {1, 5, 33, 200, 500}) {
      GroupedFfn ffn = Make(shape, 4, outputs);
      std::uniform_int_distribution<int> pick(0, shape.experts - 1);
      Work work = RandomWork(rng, outputs, 4, 3, pick);
      Check(ffn, weights, effective, work, outputs, 2);
      // Rows shared by outputs, fewer used than there is room for.
      work.x_rows = outputs / 2 + 1;
      work.used = outputs - outputs / 3;
      for (int i = 0; i < outputs; ++i) work.source.push_back(static_cast<int32_t>(rng() % work.x_rows));
      Check(ffn, weights, effective, work, outputs + 1);
      if (HasFailure()) return;
    }
  }
}

TEST_P(GroupedFfnTest, OneHotExpertAmongMany) {
  std::mt19937 rng(11);
  const GroupedFfnShape shape = {40, 128, 64};
  const Experts experts = RandomExperts(rng, shape);
  const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
  GroupedFfn ffn = Make(shape, 6, 1500);
  const Work work = RandomWork(
      rng, 1500, 6, 3, [](std::mt19937& r) { return r() % 2 == 0 ? 17 : static_cast<int>(r() % 40); });
  Check(ffn, weights, Effective(experts), work, 12, 5);
}

TEST_P(GroupedFfnTest, ManyExperts) {
  std::mt19937 rng(13);
  const GroupedFfnShape shape = {kGroupedFfnExpertsMax, 64, 64};
  const Experts experts = RandomExperts(rng, shape);
  const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
  for (const int outputs : {3, 600, 3000}) {
    GroupedFfn ffn = Make(shape, 8, outputs);
    std::uniform_int_distribution<int> pick(0, shape.experts - 1);
    Check(ffn, weights, Effective(experts), RandomWork(rng, outputs, 8, 8, pick), 14, 3);
  }
}

// The shapes of the models, few experts of them.
TEST_P(GroupedFfnTest, ModelShapes) {
  std::mt19937 rng(15);
  static const Experts models[] = {RandomExperts(rng, {3, 5120, 1536}), RandomExperts(rng, {4, 2048, 1408})};
  for (const Experts& experts : models) {
    const GroupedFfnShape& shape = experts.shape;
    const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
    GroupedFfn ffn = Make(shape, 3, 180);
    const Work work = RandomWork(rng, 180, 3, 2, [&](std::mt19937& r) {
      return r() % 3 == 0 ? static_cast<int>(r() % shape.experts) : 1;
    });
    Check(ffn, weights, Effective(experts), work, 16, 10);
    if (HasFailure()) return;
  }
}

// A row of NaN, another of infinities: flagged, and no other output changes by a bit.
TEST_P(GroupedFfnTest, NotFiniteRowsStayAlone) {
  std::mt19937 rng(17);
  const GroupedFfnShape shape = {4, 256, 192};
  const Experts experts = RandomExperts(rng, shape);
  const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
  const int outputs = 300;
  GroupedFfn ffn = Make(shape, 2, outputs);
  std::uniform_int_distribution<int> pick(0, 3);
  Work work = RandomWork(rng, outputs, 2, 2, pick);
  work.experts[2 * 11] = 1, work.experts[2 * 200] = 2;
  auto x = RandomBF16(rng, int64_t{outputs} * shape.hidden);
  const DeviceBuffer map = ToDevice(work.experts, *stream_),
                     ones = ToDevice(std::vector<float>(outputs * 2, 1.f), *stream_);
  const auto run = [&](std::vector<uint8_t>& flags) {
    const DeviceBuffer x_device = ToDevice(x, *stream_),
                       out = Poisoned(int64_t{outputs} * shape.hidden * 2, *stream_),
                       finite = Poisoned(outputs, *stream_);
    GroupedFfnArgs args;
    args.weights = &weights;
    args.x = x_device.as<bf16>();
    args.outputs = outputs;
    args.experts = map.as<int32_t>();
    args.slot_weights = ones.as<float>();
    args.partial = out.as<bf16>();
    args.finite = finite.as<uint8_t>();
    const absl::Status status = ffn.Run(args, *stream_);
    EXPECT_TRUE(status.ok()) << status;
    flags = ToHost<uint8_t>(finite, *stream_);
    return ToHost<bf16>(out, *stream_);
  };
  std::vector<uint8_t> flags, flags_clean;
  const auto clean = run(flags_clean);
  std::fill_n(x.begin() + 11 * shape.hidden, shape.hidden, bf16{0x7fff});
  x[200 * shape.hidden + 5] = 0x7f80;
  const auto got = run(flags);
  for (int i = 0; i < outputs; ++i) {
    EXPECT_EQ(flags_clean[i], 1);
    EXPECT_EQ(flags[i], i == 11 || i == 200 ? 0 : 1) << "output " << i;
    if (i == 11 || i == 200) continue;
    const int64_t at = int64_t{i} * shape.hidden;
    ASSERT_EQ(std::memcmp(&got[at], &clean[at], shape.hidden * 2), 0) << "output " << i;
  }
}

// Sums go to the rows that they are told, bit for bit what they are in order; no other row is touched.
TEST_P(GroupedFfnTest, SumsGoToTheRowsTheyAreTold) {
  std::mt19937 rng(23);
  const GroupedFfnShape shape = {4, 256, 192};
  const Experts experts = RandomExperts(rng, shape);
  const GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
  const int outputs = 70, rows = 200;
  GroupedFfn ffn = Make(shape, 2, outputs);
  std::uniform_int_distribution<int> pick(0, 3);
  const Work work = RandomWork(rng, outputs, 2, 2, pick);
  std::vector<int32_t> row_of(rows);
  std::iota(row_of.begin(), row_of.end(), 0);
  std::shuffle(row_of.begin(), row_of.end(), rng);
  row_of.resize(outputs);
  const DeviceBuffer map = ToDevice(work.experts, *stream_), row_map = ToDevice(row_of, *stream_),
                     ones = ToDevice(std::vector<float>(outputs * 2, 1.f), *stream_),
                     x = ToDevice(RandomBF16(rng, int64_t{outputs} * shape.hidden), *stream_);
  const auto run = [&](const int32_t* partial_rows, int out_rows) {
    const DeviceBuffer out = Poisoned(int64_t{out_rows} * shape.hidden * 2, *stream_);
    GroupedFfnArgs args;
    args.weights = &weights;
    args.x = x.as<bf16>();
    args.outputs = outputs;
    args.experts = map.as<int32_t>();
    args.slot_weights = ones.as<float>();
    args.partial = out.as<bf16>();
    args.partial_rows = partial_rows;
    const absl::Status status = ffn.Run(args, *stream_);
    EXPECT_TRUE(status.ok()) << status;
    return ToHost<bf16>(out, *stream_);
  };
  const auto in_order = run(nullptr, outputs), placed = run(row_map.as<int32_t>(), rows);
  std::vector<bf16> want(int64_t{rows} * shape.hidden, 0xffff);
  for (int i = 0; i < outputs; ++i) {
    std::copy_n(&in_order[int64_t{i} * shape.hidden], shape.hidden, &want[int64_t{row_of[i]} * shape.hidden]);
  }
  EXPECT_EQ(std::memcmp(placed.data(), want.data(), want.size() * 2), 0);
}

TEST_P(GroupedFfnTest, WhatDoesNotFitIsRejected) {
  std::mt19937 rng(19);
  const Experts experts = RandomExperts(rng, {2, 64, 64});
  GroupedFfnWeights weights = Load(experts, GetParam().format, *stream_);
  GroupedFfn ffn = Make({2, 64, 64}, 2, 4), other = Make({2, 64, 72}, 2, 4);
  const DeviceBuffer buffer = Poisoned(4096, *stream_);
  GroupedFfnArgs args;
  args.weights = &weights;
  args.x = buffer.as<bf16>();
  args.outputs = 5;
  args.experts = buffer.as<int32_t>();
  args.slot_weights = buffer.as<float>();
  args.partial = buffer.as<bf16>();
  EXPECT_EQ(ffn.Run(args, *stream_).code(), absl::StatusCode::kInvalidArgument);
  args.outputs = 4;
  EXPECT_EQ(other.Run(args, *stream_).code(), absl::StatusCode::kInvalidArgument);
  args.x_residual = buffer.as<float>();
  EXPECT_EQ(ffn.Run(args, *stream_).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(weights.Load(2, buffer.as<bf16>(), buffer.as<bf16>(), buffer.as<bf16>(), *stream_).code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_FALSE(GroupedFfn::Create({.shape = {2, 60, 64}, .slots = 1, .outputs_max = 1}).ok());
}

// What the rounding of the weights costs, against the weights they came from: the header's 4.5 % and some
// room.
TEST(GroupedFfnFP8, ErrorAgainstUnroundedWeights) {
  std::mt19937 rng(21);
  const Experts experts = RandomExperts(rng, {2, 512, 384});
  const Experts rounded = Rounded(experts);
  Work work{.slots = 1, .outputs = 24, .x_rows = 24};
  for (int i = 0; i < 24; ++i) work.experts.push_back(i % 2);
  const auto x = RandomBF16(rng, 24 * 512);
  const std::vector<float> ones(24, 1.f);
  const auto want = Reference(experts, work, x, ones), got = Reference(rounded, work, x, ones);
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i)
    error += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
  EXPECT_LE(std::sqrt(error / norm), 0.055);
  EXPECT_GE(std::sqrt(error / norm), 0.03);
}

INSTANTIATE_TEST_SUITE_P(Portable, GroupedFfnTest,
                         testing::Values(Form{Path::kPortable, FfnFormat::kBF16, 0},
                                         Form{Path::kPortable, FfnFormat::kFP8, 0}));
// Variants 1 and 2: that many units a block where the pairs fill one tile.
INSTANTIATE_TEST_SUITE_P(
    Hopper, GroupedFfnTest,
    testing::Values(Form{Path::kHopper, FfnFormat::kBF16, 0}, Form{Path::kHopper, FfnFormat::kBF16, 1},
                    Form{Path::kHopper, FfnFormat::kBF16, 2}, Form{Path::kHopper, FfnFormat::kFP8, 0},
                    Form{Path::kHopper, FfnFormat::kFP8, 1}, Form{Path::kHopper, FfnFormat::kFP8, 2}));

}  // namespace
}  // namespace minke::cuda
