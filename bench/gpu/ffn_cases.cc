#include "bench/gpu/ffn_cases.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <type_traits>
#include <vector>

#include "bench/gpu/fill.h"
#include "bench/gpu/measure.h"
#include "libs/kernels/cuda/grouped_ffn.h"

namespace minke::bench {
namespace {

using cuda::DeviceBuffer;
using cuda::FfnFormat;
using cuda::GroupedFfnShape;
using cuda::GroupedFfnWeights;
using cuda::Stream;

constexpr int kSlots = 6,
              kPairs = 2;  // of six choices, two fall on this shard: 20 of 160 experts and at most 3 shards
constexpr double kOfBF16 = 1.7;  // fp8 is to be that much faster

struct Case {
  std::vector<int> rows;  // of each expert, even numbers of experts in pairs of the same rows
  double tflops = 0, gbps = 0;
  std::string name;
};

absl::StatusOr<std::vector<GroupedFfnWeights>> MakeWeights(const GroupedFfnShape& shape, FfnFormat format,
                                                           const Stream& stream) {
  const int64_t size = int64_t{shape.hidden} * shape.inner;
  absl::StatusOr<DeviceBuffer> source = DeviceBuffer::Allocate(3 * size * 2);
  if (!source.ok()) return source.status();
  std::vector<GroupedFfnWeights> sets;
  uint32_t seed = 1;
  do {
    absl::StatusOr<GroupedFfnWeights> weights = GroupedFfnWeights::Create(shape, format);
    if (!weights.ok()) return weights.status();
    for (int e = 0; e < shape.experts; ++e) {
      bf16* at = source->as<bf16>();
      if (absl::Status s = FillNormal(at, 3 * size, seed++, 0.02f, stream); !s.ok()) return s;
      if (absl::Status s = weights->Load(e, at, at + size, at + 2 * size, stream); !s.ok()) return s;
    }
    sets.push_back(*std::move(weights));
  } while (std::ssize(sets) < Sets(sets[0].bytes()));
  if (absl::Status s = stream.Synchronize(); !s.ok()) return s;
  return sets;
}

struct GraphDestroyer {
  void operator()(cudaGraphExec_t graph) const noexcept { (void)cudaGraphExecDestroy(graph); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphDestroyer>;

template <class Run>
absl::StatusOr<Graph> Capture(const Stream& stream, Run run) {
  const auto check = [](cudaError_t e) {
    return e == cudaSuccess ? absl::OkStatus() : absl::InternalError(cudaGetErrorString(e));
  };
  if (absl::Status s = check(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeThreadLocal));
      !s.ok())
    return s;
  const absl::Status ran = run();
  cudaGraph_t graph = nullptr;
  if (absl::Status s = check(cudaStreamEndCapture(stream.handle(), &graph)); !s.ok()) return s;
  cudaGraphExec_t executable = nullptr;
  const absl::Status made = check(cudaGraphInstantiate(&executable, graph, 0));
  (void)cudaGraphDestroy(graph);
  if (!ran.ok()) return ran;
  if (!made.ok()) return made;
  return Graph(executable);
}

// Median milliseconds; as launches, or as replays of a captured graph.
absl::StatusOr<double> Measure(const std::vector<GroupedFfnWeights>& sets, const Case& c, cuda::Path path,
                               int variant, bool graph, const Stream& stream) {
  const GroupedFfnShape& shape = sets[0].shape();
  // Experts 2j and 2j + 1 share their rows; outputs of the pairs of experts take turns.
  std::vector<int32_t> experts;
  const int most = *std::max_element(c.rows.begin(), c.rows.end());
  for (int row = 0; row < most; ++row) {
    for (int e = 0; e + 1 < shape.experts; e += 2) {
      if (row >= c.rows[e]) continue;
      std::vector<int32_t> slots(kSlots, -1);
      slots[(row + e) % kSlots] = e;
      slots[(row + e + 3) % kSlots] = e + 1;
      experts.insert(experts.end(), slots.begin(), slots.end());
    }
  }
  const int outputs = static_cast<int>(experts.size()) / kSlots;
  const std::vector<float> slot_weights(experts.size(), 0.5f);
  const int64_t values = int64_t{outputs} * shape.hidden;
  absl::StatusOr<DeviceBuffer> x = DeviceBuffer::Allocate(values * 2),
                               out = DeviceBuffer::Allocate(values * 2),
                               finite = DeviceBuffer::Allocate(outputs),
                               expert_table = DeviceBuffer::Allocate(std::ssize(experts) * 4),
                               weight_table = DeviceBuffer::Allocate(std::ssize(experts) * 4);
  for (const auto* buffer : {&x, &out, &finite, &expert_table, &weight_table}) {
    if (!buffer->ok()) return buffer->status();
  }
  if (absl::Status s = FillNormal(x->as<bf16>(), values, 7, 1, stream); !s.ok()) return s;
  if (absl::Status s = expert_table->Upload(experts.data(), std::ssize(experts) * 4, stream); !s.ok())
    return s;
  if (absl::Status s = weight_table->Upload(slot_weights.data(), std::ssize(experts) * 4, stream); !s.ok())
    return s;
  absl::StatusOr<cuda::GroupedFfn> ffn = cuda::GroupedFfn::Create({.shape = shape,
                                                                   .format = sets[0].format(),
                                                                   .slots = kSlots,
                                                                   .outputs_max = outputs,
                                                                   .path = path,
                                                                   .variant = variant});
  if (!ffn.ok()) return ffn.status();
  const auto run = [&](int set) {
    cuda::GroupedFfnArgs args;
    args.weights = &sets[set];
    args.x = x->as<bf16>();
    args.outputs = outputs;
    args.experts = expert_table->as<int32_t>();
    args.slot_weights = weight_table->as<float>();
    args.partial = out->as<bf16>();
    args.finite = finite->as<uint8_t>();
    return ffn->Run(args, stream);
  };
  const int count = static_cast<int>(sets.size());
  if (!graph) return MedianMilliseconds(count, stream, run);
  std::vector<Graph> graphs;
  for (int set = 0; set < count; ++set) {
    absl::StatusOr<Graph> captured = Capture(stream, [&] { return run(set); });
    if (!captured.ok()) return captured.status();
    graphs.push_back(*std::move(captured));
  }
  return MedianMilliseconds(count, stream, [&](int set) {
    const cudaError_t error = cudaGraphLaunch(graphs[set].get(), stream.handle());
    return error == cudaSuccess ? absl::OkStatus() : absl::InternalError(cudaGetErrorString(error));
  });
}

}  // namespace

void RunFfnCases(const FfnCalls& calls, bool variants, bool portable, const Stream& stream) {
  struct Model {
    const char* name;
    GroupedFfnShape shape;
    std::vector<Case> cases;
  };
  const auto equal = [](int experts, int rows, double tflops, double gbps) {
    return Case{std::vector<int>(experts, rows), tflops, gbps, std::to_string(rows) + " rows each"};
  };
  Model models[] = {{"V2, 20 experts", {20, 5120, 1536}, {}}, {"V2-Lite, 64 experts", {64, 2048, 1408}, {}}};
  for (const int rows : {1, 4, 16, 32, 64, 128, 256, 512}) {
    const double tflops = rows == 256 ? 600 : rows == 512 ? 650 : 0, gbps = rows <= 64 ? 3600 : 0;
    models[0].cases.push_back(equal(20, rows, tflops, gbps));
  }
  for (const int rows : {1, 8, 32, 128, 512}) models[1].cases.push_back(equal(64, rows, 0, 0));
  Case few{std::vector<int>(20, 0), 0, 0, "1 row of 2"},
      hot{std::vector<int>(20, 20), 0, 0, "20 rows each, 2 have 2000"};
  few.rows[4] = few.rows[5] = 1;
  hot.rows[4] = hot.rows[5] = 2000;
  models[0].cases.push_back(few);
  models[0].cases.push_back(hot);
  for (const Model& model : models) {
    std::vector<double> bf16_ms(model.cases.size(), 0);
    for (const FfnFormat format : {FfnFormat::kBF16, FfnFormat::kFP8}) {
      const bool fp8 = format == FfnFormat::kFP8;
      const auto name_of = [&](const Case& c) {
        return std::string("FFN ") + (fp8 ? "fp8" : "bf16") + ", " + model.name + ", " + c.name;
      };
      if (std::none_of(model.cases.begin(), model.cases.end(),
                       [&](const Case& c) { return calls.wanted(name_of(c)); })) {
        continue;
      }
      const auto sets = MakeWeights(model.shape, format, stream);
      if (!sets.ok()) {
        calls.fail(model.name, sets.status());
        continue;
      }
      for (size_t i = 0; i < model.cases.size(); ++i) {
        const Case& c = model.cases[i];
        if (!calls.wanted(name_of(c))) continue;
        double rows = 0, active = 0;
        for (const int n : c.rows) rows += n, active += n > 0;
        const double weights = 3.0 * model.shape.hidden * model.shape.inner;
        const auto run = [&](const std::string& name, cuda::Path path, int variant, bool main,
                             bool graph = false) {
          const absl::StatusOr<double> ms = Measure(*sets, c, path, variant, graph, stream);
          if (!ms.ok()) return calls.fail(name, ms.status());
          FfnRow row{.work = name,
                     .ms = *ms,
                     .flops = 2 * weights * rows,
                     .bytes = weights * active * (fp8 ? 1 : 2)};
          if (main && !fp8) {
            bf16_ms[i] = *ms;
            row.target_tflops = c.tflops, row.target_gbps = c.gbps;
          } else if (main && c.gbps > 0 && bf16_ms[i] > 0) {
            row.target_ms = bf16_ms[i] / kOfBF16;
          }
          calls.report(row);
        };
        run(name_of(c), cuda::Path::kAuto, 0, true);
        if (c.gbps > 0) run("  as a graph", cuda::Path::kAuto, 0, false, true);
        if (variants) {
          for (const int variant : {1, 2})
            run("  variant " + std::to_string(variant), cuda::Path::kAuto, variant, false);
        }
        if (portable) run("  portable", cuda::Path::kPortable, 0, false);
      }
    }
  }
}

}  // namespace minke::bench
