#include "libs/base/strings.h"
#include "libs/kernels/bench/kernel_case.h"
#include "libs/kernels/cpu/matmul.h"

namespace minke::kernels::bench {
namespace {

struct Shape {
  int64_t k, n;
};
// An expert of DeepSeek-V2, one of bench/v2-bench.config.json, and the head of the latter.
constexpr Shape kShapes[] = {{5120, 1536}, {1024, 384}, {1024, 102400}};

KernelCase MatMulCase(Precision precision, Shape shape, int64_t rows) {
  const auto [k, n] = shape;
  const char* const name = precision == Precision::kExact ? "MatMulExact" : "MatMulBf16";
  return {.name = StrCat(name, "/", rows, "/", k, "/", n),
          .precision = precision,
          .bytes = static_cast<double>(n * k * ActivationBytes(precision)),
          .flops = 2.0 * static_cast<double>(rows * n * k),
          .prepare = [=](Workspace& workspace) {
            ThreadPool& pool = workspace.pool();
            auto weights = workspace.Keep("weights", StrCat(name, k, "x", n), [&] {
              std::vector<PackedMatrix> sets(RotatingSets(n * k * ActivationBytes(precision)));
              for (PackedMatrix& set : sets) {
                set = PackedMatrix::Pack(
                    precision, n, k, [&](int64_t row, std::span<float> out) { PatternWeights(row * k, out); },
                    pool);
              }
              return sets;
            });
            auto y = std::make_shared<std::vector<float>>(rows * n);
            return [=, &pool, x = RandomActivations(precision, rows * k), next = size_t{0}]() mutable {
              MatMul((*weights)[next++ % weights->size()], x.data(), k, rows, y->data(), n, pool);
            };
          }};
}

}  // namespace

std::vector<KernelCase> MatMulCases() {
  std::vector<KernelCase> cases;
  for (const Precision precision : {Precision::kBF16, Precision::kExact}) {
    for (const Shape& shape : kShapes) {
      for (const int64_t rows : {1, 4, 16, 64, 256}) cases.push_back(MatMulCase(precision, shape, rows));
    }
  }
  return cases;
}

}  // namespace minke::kernels::bench
