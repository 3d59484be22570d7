#include "libs/kernels/cuda/mla_generic.h"

#include "tests/gpu/gpu_support.h"

namespace minke::cuda {
namespace {

using namespace testing_support;

struct Shape {
  int heads, rank, rope;
};

TEST(MlaGeneric, MatchesFloat64) {
  auto stream = Stream::Create();
  ASSERT_TRUE(stream.ok());
  std::mt19937 rng(3);
  for (const Shape s :
       {Shape{8, 64, 16}, Shape{3, 40, 8}, Shape{16, 512, 64}, Shape{1, 8, 0}, Shape{2, 7000, 64}}) {
    const int dim = s.rank + s.rope, stride = 5;
    // Rows of three sequences, in no order: decode rows and a chunk.
    const std::vector<int32_t> sequences = {2, 0, 1, 1, 1, 0}, positions = {0, 63, 64, 65, 66, 300};
    const std::vector<uint32_t> table = {4, 9, 1, 7, 3, 2, 8, 0, 0, 0, 6, 0, 0, 0, 0};
    auto cache = RandomBF16(rng, 10 * 64 * dim);
    for (int i = 1; i < 64; ++i) {  // what no row sees is NaN
      std::fill_n(&cache[(6 * 64 + i) * dim], dim, 0x7fff);
    }
    const int rows = static_cast<int>(sequences.size());
    const float scale = 1 / std::sqrt(static_cast<float>(dim));
    const auto q = RandomBF16(rng, rows * s.heads * dim);
    std::vector<double> want(rows * s.heads * s.rank);
    ParallelFor(rows * s.heads, [&](int64_t at) {
      const int row = static_cast<int>(at / s.heads), seen = positions[row] + 1;
      const auto latent = [&](int j) {
        return &cache[(int64_t{table[sequences[row] * stride + j / 64]} * 64 + j % 64) * dim];
      };
      std::vector<double> score(seen);
      double max = -INFINITY, total = 0;
      for (int j = 0; j < seen; ++j) {
        for (int d = 0; d < dim; ++d)
          score[j] += double{BF16ToF32(q[at * dim + d])} * BF16ToF32(latent(j)[d]);
        max = std::max(max, score[j] *= scale);
      }
      for (double& x : score) total += x = std::exp(x - max);
      for (int j = 0; j < seen; ++j) {
        for (int d = 0; d < s.rank; ++d) want[at * s.rank + d] += score[j] / total * BF16ToF32(latent(j)[d]);
      }
    });
    const auto q_device = ToDevice(q, *stream), cache_device = ToDevice(cache, *stream);
    const auto table_device = ToDevice(table, *stream);
    const auto sequences_device = ToDevice(sequences, *stream),
               positions_device = ToDevice(positions, *stream);
    const auto out = Poisoned(std::ssize(want) * 2, *stream);
    const absl::Status ran = MlaGeneric({.q = q_device.as<bf16>(),
                                         .cache = cache_device.as<bf16>(),
                                         .page_table = table_device.as<uint32_t>(),
                                         .page_table_stride = stride,
                                         .sequences = sequences_device.as<int32_t>(),
                                         .positions = positions_device.as<int32_t>(),
                                         .out = out.as<bf16>(),
                                         .rows = rows,
                                         .heads = s.heads,
                                         .rank = s.rank,
                                         .rope = s.rope,
                                         .softmax_scale = scale},
                                        *stream);
    ASSERT_TRUE(ran.ok()) << ran;
    ExpectClose(ToHost<bf16>(out, *stream), want, s.rank, 4e-3, 6e-3, "generic");
  }
}

}  // namespace
}  // namespace minke::cuda
