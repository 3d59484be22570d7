#include "libs/kernels/cuda/rows.h"

#include <algorithm>

#include "libs/kernels/cpu/rope.h"
#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

std::vector<float> RandomF32(std::mt19937& rng, int64_t count, float mean = 0, float deviation = 1) {
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> values(count);
  for (float& v : values) v = normal(rng);
  return values;
}

ModelConfig YarnConfigOf(int rope) {
  ModelConfig config;
  config.qk_rope_head_dim = rope;
  config.yarn = YarnConfig{40, 4096, 32, 1, 0.8, 1.0};
  return config;
}

class RowsTest : public testing::Test {
 protected:
  RowsTest() : stream_(*Stream::Create()) {}
  Stream stream_;
  std::mt19937 rng_{7};
};

TEST_F(RowsTest, EmbeddingIsExactAndStaysInTheTable) {
  const auto table = RandomBF16(rng_, 100 * 72);
  const std::vector<uint32_t> tokens = {0, 99, 5, 5, 4000000000u};
  const auto table_device = ToDevice(table, stream_);
  const auto tokens_device = ToDevice(tokens, stream_);
  const auto x = Poisoned(5 * 72 * 4, stream_);
  ASSERT_TRUE(
      EmbedRows(table_device.as<bf16>(), 100, tokens_device.as<uint32_t>(), 5, 72, x.as<float>(), stream_)
          .ok());
  const auto got = ToHost<float>(x, stream_);
  for (int i = 0; i < 5 * 72; ++i) {
    ASSERT_EQ(got[i], BF16ToF32(table[std::min<uint32_t>(tokens[i / 72], 99) * 72 + i % 72])) << i;
  }
}

TEST_F(RowsTest, AnglesAreTheHosts) {
  const kernels::Rope rope(YarnConfigOf(64));
  const std::vector<double> inv_freq(rope.inv_freq().begin(), rope.inv_freq().end());
  const std::vector<int32_t> positions = {0, 1, 63, 4096, 163839};
  const auto freq_device = ToDevice(inv_freq, stream_);
  const auto positions_device = ToDevice(positions, stream_);
  const auto out = Poisoned(5 * 64 * 4, stream_);
  ASSERT_TRUE(RotaryAngles(freq_device.as<double>(), rope.magnitude(), 32, positions_device.as<int32_t>(), 5,
                           out.as<float>(), stream_)
                  .ok());
  const auto got = ToHost<float>(out, stream_);
  for (int r = 0; r < 5; ++r) {
    float want[64];
    rope.Angles(positions[r], want);
    for (int i = 0; i < 64; ++i) ASSERT_NEAR(got[r * 64 + i], want[i], 2e-7) << r << " " << i;
  }
}

TEST_F(RowsTest, NormAddsAndSelects) {
  for (const int width : {8, 192, 2048, 5120, 6152, 7168}) {
    for (const bool add : {false, true}) {
      const int rows = 5;
      const auto x = RandomF32(rng_, rows * width, 0.3f, 2), weight = RandomF32(rng_, width, 1, 0.1f);
      const auto more = RandomBF16(rng_, rows * width);
      const std::vector<int32_t> select = {4, 0, 4};
      const auto x_device = ToDevice(x, stream_), weight_device = ToDevice(weight, stream_);
      const auto more_device = ToDevice(more, stream_);
      const auto select_device = ToDevice(select, stream_);
      std::vector<double> want(rows * width);
      std::vector<float> sum(x);
      for (int r = 0; r < rows; ++r) {
        double square = 0;
        for (int i = r * width; i < (r + 1) * width; ++i) {
          if (add) sum[i] += BF16ToF32(more[i]);
          square += double{sum[i]} * sum[i];
        }
        for (int i = 0; i < width; ++i) {
          want[r * width + i] = sum[r * width + i] / std::sqrt(square / width + 1e-6) * weight[i];
        }
      }
      NormArgs args = {.x = x_device.as<float>(),
                       .add = add ? more_device.as<bf16>() : nullptr,
                       .weight = weight_device.as<float>(),
                       .eps = 1e-6f,
                       .rows = 3,
                       .width = width,
                       .select = select_device.as<int32_t>()};
      const auto selected = Poisoned(3 * width * 2, stream_), all = Poisoned(rows * width * 2, stream_);
      args.out = selected.as<bf16>();
      ASSERT_TRUE(NormRows(args, stream_).ok());
      EXPECT_EQ(ToHost<float>(x_device, stream_), x) << "select leaves x alone";
      std::vector<double> want_selected;
      for (const int r : select)
        want_selected.insert(want_selected.end(), &want[r * width], &want[r * width] + width);
      ExpectClose(ToHost<bf16>(selected, stream_), want_selected, width, 3e-3, 4e-3, "selected");
      args.out = all.as<bf16>(), args.select = nullptr, args.rows = rows;
      ASSERT_TRUE(NormRows(args, stream_).ok());
      ExpectClose(ToHost<bf16>(all, stream_), want, width, 3e-3, 4e-3, "all");
      EXPECT_EQ(ToHost<float>(x_device, stream_), sum);
    }
  }
}

struct MlaShape {
  int rows, q_rank, heads, nope, rope, rank;
};

TEST_F(RowsTest, LatentAndQueryRows) {
  for (const auto& s : {MlaShape{3, 96, 8, 32, 16, 64}, MlaShape{2, 0, 16, 128, 64, 512},
                        MlaShape{5, 1536, 128, 128, 64, 512}, MlaShape{1, 24, 3, 8, 8, 8}}) {
    const int qk = s.nope + s.rope, q_width = s.q_rank > 0 ? s.q_rank : s.heads * qk,
              latent = s.rank + s.rope;
    const int width = q_width + latent;
    const auto qkv = RandomBF16(rng_, s.rows * width), q_wide = RandomBF16(rng_, s.rows * s.heads * qk);
    const auto q_norm = RandomF32(rng_, std::max(8, s.q_rank), 1, 0.1f),
               kv_norm = RandomF32(rng_, s.rank, 1, 0.1f);
    const auto angles = RandomF32(rng_, s.rows * s.rope);
    std::vector<uint32_t> pages;
    std::vector<int32_t> positions;
    for (int r = 0; r < s.rows; ++r) pages.push_back(s.rows - 1 - r), positions.push_back(63 + 64 * r + r);
    const auto qkv_device = ToDevice(qkv, stream_), q_device = ToDevice(q_wide, stream_);
    const auto q_norm_device = ToDevice(q_norm, stream_), kv_norm_device = ToDevice(kv_norm, stream_),
               angles_device = ToDevice(angles, stream_);
    const auto pages_device = ToDevice(pages, stream_);
    const auto positions_device = ToDevice(positions, stream_);
    const auto cache = Poisoned(s.rows * 64 * latent * 2, stream_);
    const auto compressed = Poisoned(std::max(8, s.rows * s.q_rank) * 2, stream_);
    const auto packed = Poisoned(s.rows * s.heads * qk * 2, stream_);
    const auto q_latent = Poisoned(s.rows * s.heads * latent * 2, stream_);
    LatentArgs l = {.qkv = qkv_device.as<bf16>(),
                    .qkv_row = width,
                    .q_rank = s.q_rank,
                    .q_norm = q_norm_device.as<float>(),
                    .q_compressed = compressed.as<bf16>(),
                    .latent_offset = q_width,
                    .rank = s.rank,
                    .rope = s.rope,
                    .latent_norm = kv_norm_device.as<float>(),
                    .eps = 1e-5f,
                    .cos_sin = angles_device.as<float>(),
                    .cache = cache.as<bf16>(),
                    .pages = pages_device.as<uint32_t>(),
                    .positions = positions_device.as<int32_t>()};
    const bool direct = s.q_rank == 0;
    const std::vector<bf16>& q = direct ? qkv : q_wide;
    const int q_row = direct ? width : s.heads * qk;
    QueryArgs absorbed = {.q = direct ? qkv_device.as<bf16>() : q_device.as<bf16>(),
                          .q_row = q_row,
                          .heads = s.heads,
                          .nope = s.nope,
                          .rope = s.rope,
                          .cos_sin = angles_device.as<float>(),
                          .rotated = q_latent.as<bf16>() + s.rank,
                          .rotated_row = s.heads * latent,
                          .rotated_head = latent};
    QueryArgs naive = absorbed;
    naive.rotated = packed.as<bf16>() + s.nope, naive.nope_copy = packed.as<bf16>();
    naive.rotated_row = s.heads * qk, naive.rotated_head = qk;
    ASSERT_TRUE(LatentAndQueryRows(&l, &absorbed, s.rows, stream_).ok());
    ASSERT_TRUE(LatentAndQueryRows(nullptr, &naive, s.rows, stream_).ok());

    const auto rotate = [&](const bf16* from, int row) {
      std::vector<double> out(s.rope);
      for (int i = 0; i < s.rope / 2; ++i) {
        const double c = angles[row * s.rope + i], sn = angles[row * s.rope + s.rope / 2 + i];
        const double even = BF16ToF32(from[2 * i]), odd = BF16ToF32(from[2 * i + 1]);
        out[2 * i] = even * c - odd * sn, out[2 * i + 1] = even * sn + odd * c;
      }
      return out;
    };
    const auto norm = [&](const bf16* from, int n, const std::vector<float>& weight) {
      double square = 0;
      std::vector<double> out(n);
      for (int i = 0; i < n; ++i) square += std::pow(double{BF16ToF32(from[i])}, 2);
      for (int i = 0; i < n; ++i) out[i] = BF16ToF32(from[i]) / std::sqrt(square / n + 1e-5) * weight[i];
      return out;
    };
    const auto got_cache = ToHost<bf16>(cache, stream_), got_packed = ToHost<bf16>(packed, stream_);
    const auto got_latent = ToHost<bf16>(q_latent, stream_),
               got_compressed = ToHost<bf16>(compressed, stream_);
    const auto part = [](const std::vector<bf16>& all, int64_t begin, int64_t n) {
      return std::vector<bf16>(all.begin() + begin, all.begin() + begin + n);
    };
    int64_t written = 0;
    for (const bf16 v : got_cache) written += v != 0xffff;
    EXPECT_EQ(written, int64_t{s.rows} * latent) << "only the rows' own slots";
    for (int r = 0; r < s.rows; ++r) {
      const bf16* row = &qkv[r * width];
      const int64_t slot = (pages[r] * 64 + positions[r] % 64) * latent;
      ExpectClose(part(got_cache, slot, s.rank), norm(row + q_width, s.rank, kv_norm), s.rank, 4e-3, 4e-3,
                  "latent");
      ExpectClose(part(got_cache, slot + s.rank, s.rope), rotate(row + q_width + s.rank, r), s.rope, 4e-3,
                  4e-3, "key");
      if (s.q_rank > 0) {
        ExpectClose(part(got_compressed, r * s.q_rank, s.q_rank), norm(row, s.q_rank, q_norm), s.q_rank, 4e-3,
                    4e-3, "q");
      }
      for (int h = 0; h < s.heads; ++h) {
        const bf16* from = &q[r * q_row + h * qk];
        const auto want = rotate(from + s.nope, r);
        const int64_t head = r * s.heads + h;
        ExpectClose(part(got_latent, head * latent + s.rank, s.rope), want, s.rope, 4e-3, 4e-3, "absorbed");
        ExpectClose(part(got_packed, head * qk + s.nope, s.rope), want, s.rope, 4e-3, 4e-3, "packed");
        EXPECT_EQ(part(got_packed, head * qk, s.nope), std::vector<bf16>(from, from + s.nope));
      }
    }
  }
}

TEST_F(RowsTest, GatherFollowsThePageTable) {
  const int width = 80;
  const auto cache = RandomBF16(rng_, 9 * 64 * width);
  const std::vector<uint32_t> table = {7, 2, 0, 5, 0, 0, 8, 1, 3};
  const std::vector<int32_t> keys = {70, 1, 192}, begin = {0, 70, 71};
  const auto cache_device = ToDevice(cache, stream_);
  const auto table_device = ToDevice(table, stream_);
  const auto keys_device = ToDevice(keys, stream_), begin_device = ToDevice(begin, stream_);
  const auto out = Poisoned(263 * width * 2, stream_);
  ASSERT_TRUE(GatherLatents({.cache = cache_device.as<bf16>(),
                             .width = width,
                             .page_table = table_device.as<uint32_t>(),
                             .stride = 3,
                             .keys = keys_device.as<int32_t>(),
                             .key_begin = begin_device.as<int32_t>(),
                             .sequences = 3,
                             .pages_max = 3,
                             .out = out.as<bf16>()},
                            stream_)
                  .ok());
  const auto got = ToHost<bf16>(out, stream_);
  for (int s = 0; s < 3; ++s) {
    for (int key = 0; key < keys[s]; ++key) {
      for (int i = 0; i < width; ++i) {
        ASSERT_EQ(got[(begin[s] + key) * width + i],
                  cache[(table[s * 3 + key / 64] * 64 + key % 64) * width + i]);
      }
    }
  }
}

TEST_F(RowsTest, SwiGluAndPartialSums) {
  const int rows = 3, inner = 40;
  const auto gate_up = RandomBF16(rng_, rows * 2 * inner, 3);
  const auto in = ToDevice(gate_up, stream_);
  const auto out = Poisoned(rows * inner * 2, stream_);
  ASSERT_TRUE(SwiGluRows(in.as<bf16>(), rows, inner, out.as<bf16>(), stream_).ok());
  std::vector<double> want(rows * inner);
  for (int i = 0; i < rows * inner; ++i) {
    const double gate = BF16ToF32(gate_up[i / inner * 2 * inner + i % inner]);
    want[i] = gate / (1 + std::exp(-gate)) * BF16ToF32(gate_up[i / inner * 2 * inner + inner + i % inner]);
  }
  ExpectClose(ToHost<bf16>(out, stream_), want, inner, 4e-3, 5e-3, "swiglu");

  const auto x = RandomF32(rng_, rows * inner);
  const auto partials = RandomBF16(rng_, 4 * inner);
  const std::vector<int32_t> begin = {0, 3, 3, 4};
  const auto x_device = ToDevice(x, stream_);
  const auto partials_device = ToDevice(partials, stream_);
  const auto begin_device = ToDevice(begin, stream_);
  ASSERT_TRUE(AddPartialRows(x_device.as<float>(), rows, inner, begin_device.as<int32_t>(),
                             partials_device.as<bf16>(), stream_)
                  .ok());
  const auto got = ToHost<float>(x_device, stream_);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < inner; ++i) {
      float sum = x[r * inner + i];
      for (int p = begin[r]; p < begin[r + 1]; ++p) sum += BF16ToF32(partials[p * inner + i]);
      ASSERT_EQ(got[r * inner + i], sum);
    }
  }
}

}  // namespace
}  // namespace minke::cuda
