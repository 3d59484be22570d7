#include "libs/kernels/cpu/grouped_ffn.h"

#include <algorithm>
#include <vector>

#include "libs/base/status.h"

namespace minke::kernels {
namespace {

constexpr int64_t kTaskRows = 96;

// A strip of rows of one item. Kept in a thread-local vector: steady state allocates nothing.
struct Strip {
  const FfnWeights* weights;
  int64_t begin, count;
};

const std::vector<Strip>& PlanStrips(std::span<const FfnRows> items) {
  static thread_local std::vector<Strip> strips;
  strips.clear();
  for (const FfnRows& item : items) {
    for (int64_t at = 0; at < item.count; at += kTaskRows) {
      strips.push_back({item.weights, item.begin + at, std::min(kTaskRows, item.count - at)});
    }
  }
  return strips;
}

}  // namespace

absl::StatusOr<FfnWeights> FfnWeights::Load(const Checkpoint& checkpoint, const std::string& prefix,
                                            int64_t hidden, int64_t inner, Precision precision,
                                            ThreadPool& pool, Share share) {
  const int64_t part = inner / share.of, first = share.index * part;
  const int64_t wide[] = {inner, hidden}, tall[] = {hidden, inner};
  MK_ASSIGN_OR_RETURN(const TensorView gate, checkpoint.Find(prefix + "gate_proj.weight", wide));
  MK_ASSIGN_OR_RETURN(const TensorView up, checkpoint.Find(prefix + "up_proj.weight", wide));
  MK_ASSIGN_OR_RETURN(const TensorView down, checkpoint.Find(prefix + "down_proj.weight", tall));
  const auto rows = [&](const TensorView& view) {
    return [&view, first, hidden](int64_t begin, std::span<float> out) {
      view.Read(first * hidden + begin, out);
    };
  };
  const auto columns = [&](int64_t begin,
                           std::span<float> out) {  // Pack asks for whole rows of `part` columns
    down.Read(begin / part * inner + first, out);
  };
  FfnWeights weights = Pack(hidden, part, precision, rows(gate), rows(up), columns, pool);
  for (const TensorView& view : {gate, up, down}) checkpoint.Release(view);
  return weights;
}

FfnWeights FfnWeights::Empty(int64_t hidden, int64_t inner, Precision precision) {
  FfnWeights weights;
  const int64_t half_blocks = (inner + kBlockColumns - 1) / kBlockColumns;
  weights.gate_up_ = PackedMatrix::Empty(precision, 2 * half_blocks * kBlockColumns, hidden);
  weights.down_ = PackedMatrix::Empty(precision, hidden, inner);
  return weights;
}

FfnWeights FfnWeights::Pack(int64_t hidden, int64_t inner, Precision precision, ElementReader gate,
                            ElementReader up, ElementReader down, ThreadPool& pool) {
  FfnWeights weights;
  const int64_t half_blocks = (inner + kBlockColumns - 1) / kBlockColumns;
  weights.gate_up_ = PackedMatrix::Pack(
      precision, 2 * half_blocks * kBlockColumns, hidden,
      [&](int64_t row, std::span<float> out) {
        const int64_t block = row / kBlockColumns, column = block / 2 * kBlockColumns + row % kBlockColumns;
        if (column < inner) {
          (block % 2 == 0 ? gate : up)(column * hidden, out);
        } else {
          std::fill(out.begin(), out.end(), 0.0f);
        }
      },
      pool);
  weights.down_ = PackedMatrix::Pack(
      precision, hidden, inner, [&](int64_t row, std::span<float> out) { down(row * inner, out); }, pool);
  return weights;
}

void GroupedFfn(std::span<const FfnRows> items, const std::byte* x, float* y, FfnScratch& scratch,
                ThreadPool& pool) {
  const std::vector<Strip>& strips = PlanStrips(items);
  if (strips.empty()) return;
  const FfnWeights& first = *strips.front().weights;
  const Precision precision = first.down().precision();
  const int64_t hidden = first.hidden(), inner = first.inner(), element = ActivationBytes(precision);
  int64_t rows_end = 0;
  for (const Strip& strip : strips) {
    MK_CHECK(strip.weights->hidden() == hidden && strip.weights->inner() == inner);
    rows_end = std::max(rows_end, strip.begin + strip.count);
  }
  std::byte* activated = scratch.inner.Resize(rows_end * inner * element);

  const int64_t num_strips = std::ssize(strips);
  const auto* const strip_data = strips.data();  // thread_local: workers must not look it up themselves
  // Where most strips are a row or two, tasks take as many blocks as are worth reading side by side.
  const int64_t rows_typical =
      std::min_element(strips.begin(), strips.end(), [](const Strip& a, const Strip& b) {
        return a.count < b.count;
      })->count;
  const int64_t half_blocks = first.gate_up().blocks() / 2;
  // A block of gate and its block of up are neighbours: pairs of both are four streams.
  const int64_t pairs_per_task = std::max<int64_t>(
      1, BlocksPerTask(first.gate_up(), rows_typical, num_strips * half_blocks, pool.threads()) / 2);
  const int64_t gate_tasks = (half_blocks + pairs_per_task - 1) / pairs_per_task;
  pool.ParallelFor(num_strips * gate_tasks, [&](int64_t task) {
    const Strip& strip = strip_data[task / gate_tasks];
    const int64_t begin = task % gate_tasks * pairs_per_task,
                  pairs = std::min(pairs_per_task, half_blocks - begin);
    constexpr int64_t kBlock = kTaskRows * kBlockColumns;
    alignas(64) float products[kStreamsMax * kBlock];  // gate, up of each pair
    MatMulBlocks(strip.weights->gate_up(), 2 * begin, 2 * pairs, x + strip.begin * hidden * element, hidden,
                 strip.count, products, kBlock, kBlockColumns);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t column = (begin + pair) * kBlockColumns, width = std::min(kBlockColumns, inner - column);
      for (int64_t i = 0; i < strip.count; ++i) {
        float* gate = products + 2 * pair * kBlock + i * kBlockColumns;
        Tiles().silu_mul(gate, gate + kBlock, gate, width);
        ToActivation(precision, gate, activated + ((strip.begin + i) * inner + column) * element, width);
      }
    }
  });

  const int64_t down_blocks = first.down().blocks();
  const int64_t down_per_task =
      BlocksPerTask(first.down(), rows_typical, num_strips * down_blocks, pool.threads());
  const int64_t down_tasks = (down_blocks + down_per_task - 1) / down_per_task;
  pool.ParallelFor(num_strips * down_tasks, [&](int64_t task) {
    const Strip& strip = strip_data[task / down_tasks];
    const int64_t begin = task % down_tasks * down_per_task;
    MatMulBlocks(strip.weights->down(), begin, std::min(down_per_task, down_blocks - begin),
                 activated + strip.begin * inner * element, inner, strip.count,
                 y + strip.begin * hidden + begin * kBlockColumns, kBlockColumns, hidden);
  });
}

}  // namespace minke::kernels
