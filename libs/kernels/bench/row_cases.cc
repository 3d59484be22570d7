#include <cstring>

#include "absl/functional/function_ref.h"
#include "libs/base/status.h"
#include "libs/kernels/bench/kernel_case.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/kernels/cpu/rope.h"
#include "libs/kernels/cpu/top_k.h"

namespace minke::kernels::bench {
namespace {

constexpr int64_t kGrain = 8;  // rows of a task, as in the attention node

void ForRows(ThreadPool& pool, int64_t rows, absl::FunctionRef<void(int64_t)> body) {
  pool.ParallelFor((rows + kGrain - 1) / kGrain, [&](int64_t task) {
    for (int64_t i = task * kGrain; i < std::min(rows, (task + 1) * kGrain); ++i) body(i);
  });
}

// kRotateBytes of f32 activations, one random MiB over and over.
HugeBuffer MakeActivations(ThreadPool& pool) {
  constexpr int64_t kPiece = 1 << 20;
  HugeBuffer buffer(kRotateBytes);
  const std::vector<float> piece = RandomFloats(kPiece / 4);
  pool.ParallelFor(kRotateBytes / kPiece,
                   [&](int64_t i) { std::memcpy(buffer.data() + i * kPiece, piece.data(), kPiece); });
  return buffer;
}

// One call after the other on [rows, width] f32 of the buffer.
class Rotation {
 public:
  Rotation(Workspace& workspace, int64_t elements)
      : buffer_(workspace.Keep("activations", "f32", [&] { return MakeActivations(workspace.pool()); })),
        elements_(elements),
        count_(buffer_->bytes() / 4 / elements) {}
  float* Next() { return reinterpret_cast<float*>(buffer_->data()) + next_++ % count_ * elements_; }

 private:
  std::shared_ptr<HugeBuffer> buffer_;
  int64_t elements_, count_, next_ = 0;
};

KernelCase NormCase(int64_t rows, int64_t hidden) {
  return {.name = StrCat("RmsNormToBf16/", rows, "/", hidden),
          .precision = Precision::kExact,
          .bytes = 4.0 * static_cast<double>(rows * hidden),
          .flops = 4.0 * static_cast<double>(rows * hidden),
          .prepare = [=](Workspace& workspace) {
            auto out = std::make_shared<std::vector<bf16>>(rows * hidden);
            return [=, &pool = workspace.pool(), x = Rotation(workspace, rows * hidden),
                    weight = std::vector<float>(hidden, 1.0f)]() mutable {
              const float* input = x.Next();
              ForRows(pool, rows, [&](int64_t i) {
                static thread_local std::vector<float> normed;
                normed.resize(hidden);
                Tiles().rms_norm(input + i * hidden, weight.data(), 1e-6f, normed.data(), hidden);
                ToActivation(Precision::kBF16, normed.data(),
                             reinterpret_cast<std::byte*>(out->data() + i * hidden), hidden);
              });
            };
          }};
}

// The queries of all heads, [rows, heads, nope + rope].
KernelCase RopeCase(int64_t rows, int64_t heads) {
  const ModelConfig config = DeepSeekV2Config(static_cast<int32_t>(heads));
  const int64_t rope_dim = config.qk_rope_head_dim, q_dim = config.qk_head_dim(),
                nope_dim = config.qk_nope_head_dim;
  return {.name = StrCat("Rope/", rows, "/heads:", heads),
          .precision = Precision::kExact,
          .bytes = 4.0 * static_cast<double>(rows * heads * rope_dim),
          .flops = 3.0 * static_cast<double>(rows * heads * rope_dim),
          .prepare = [=](Workspace& workspace) {
            std::vector<float> angles(rows * rope_dim);
            const Rope rope(config);
            for (int64_t i = 0; i < rows; ++i) rope.Angles(1000 + i, angles.data() + i * rope_dim);
            return [=, &pool = workspace.pool(), angles = std::move(angles),
                    q = Rotation(workspace, rows * heads * q_dim)]() mutable {
              float* queries = q.Next();
              ForRows(pool, rows, [&](int64_t i) {
                for (int64_t h = 0; h < heads; ++h) {
                  ApplyRope(angles.data() + i * rope_dim, rope_dim / 2,
                            queries + (i * heads + h) * q_dim + nope_dim);
                }
              });
            };
          }};
}

// As the router's gate does it: logits of all experts, then group-limited top-k of each row.
KernelCase GateCase(int64_t rows) {
  const ModelConfig config = DeepSeekV2Config(128);
  const int64_t hidden = config.hidden_size, experts = config.n_routed_experts,
                k = config.num_experts_per_tok;
  return {.name = StrCat("Gate/", rows, "/", hidden, "/", experts),
          .bytes = 2.0 * static_cast<double>(experts * hidden),
          .flops = 2.0 * static_cast<double>(rows * experts * hidden),
          .prepare = [=](Workspace& workspace) {
            ThreadPool& pool = workspace.pool();
            auto weights = workspace.Keep("weights", "gate", [&] {
              std::vector<PackedMatrix> sets(RotatingSets(experts * hidden * 2));
              for (PackedMatrix& set : sets) {
                set = PackedMatrix::Pack(
                    Precision::kBF16, experts, hidden,
                    [&](int64_t row, std::span<float> out) { PatternWeights(row * hidden, out); }, pool);
              }
              return sets;
            });
            struct State {
              std::vector<std::byte> x;
              std::vector<float> logits, scores, weights;
              std::vector<uint16_t> experts;
              size_t set = 0;
            };
            auto state = std::make_shared<State>();
            state->x = RandomActivations(Precision::kBF16, rows * hidden);
            state->logits.resize(rows * experts);
            state->scores.resize(rows * experts);
            state->weights.resize(rows * k);
            state->experts.resize(rows * k);
            return [=, &pool] {
              State& s = *state;
              MatMul((*weights)[s.set++ % weights->size()], s.x.data(), hidden, rows, s.logits.data(),
                     experts, pool);
              ForRows(pool, rows, [&](int64_t i) {
                MK_CHECK(RouteToken(config, s.logits.data() + i * experts, s.scores.data() + i * experts,
                                    s.experts.data() + i * k, s.weights.data() + i * k)
                             .ok());
              });
            };
          }};
}

}  // namespace

std::vector<KernelCase> RowCases() {
  std::vector<KernelCase> cases;
  for (const int64_t hidden : {1024, 5120}) {
    for (const int64_t rows : {1, 64, 512}) cases.push_back(NormCase(rows, hidden));
  }
  for (const int64_t heads : {16, 128}) {
    for (const int64_t rows : {1, 64}) cases.push_back(RopeCase(rows, heads));
  }
  for (const int64_t rows : {1, 64, 512}) cases.push_back(GateCase(rows));
  return cases;
}

}  // namespace minke::kernels::bench
