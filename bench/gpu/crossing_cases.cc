#include "bench/gpu/crossing_cases.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "bench/gpu/measure.h"
#include "bench/gpu/random_model.h"
#include "libs/base/status.h"
#include "libs/cuda_model/decode_segments.h"
#include "libs/gpu_rows/gpu_rows.h"
#include "libs/kernels/cuda/rows.h"

namespace minke::bench {
namespace {

using cuda::DeviceBuffer;
using cuda::Stream;
using cuda_model::AttentionOnGpu;
using cuda_model::DecodeSegments;

// Layer 0 is dense and layer 1 is the first that has experts, so layer 2 is the first whose segment begins
// with sums.
constexpr int32_t kLayers = 5, kFirstMeasured = 2;

// Median milliseconds a layer by the host's clock, from the GPU idle to the GPU idle. `prepare` is not timed.
template <class Prepare, class Run>
absl::StatusOr<double> HostMilliseconds(const Stream& stream, Prepare prepare, Run run) {
  std::vector<double> times;
  for (int i = -kWarmups; i < kRuns; ++i) {
    MK_RETURN_IF_ERROR(prepare());
    MK_RETURN_IF_ERROR(stream.Synchronize());
    const auto begin = std::chrono::steady_clock::now();
    MK_RETURN_IF_ERROR(run());
    MK_RETURN_IF_ERROR(stream.Synchronize());
    const auto end = std::chrono::steady_clock::now();
    if (i >= 0) times.push_back(std::chrono::duration<double, std::milli>(end - begin).count());
  }
  std::sort(times.begin(), times.end());
  return times[kRuns / 2] / (kLayers - kFirstMeasured);
}

// As a node does it with rows in GPU memory: rows into a message's blocks, and three sums a row, which lie in
// blocks of other messages, added up.
absl::StatusOr<double> RowsOnDevice(AttentionOnGpu& attention, int batch,
                                    std::span<const cuda_model::DecodeInput> inputs, int64_t context_max) {
  constexpr int kSumsEach = 3;
  const int64_t hidden = attention.config().hidden_size, row_bytes = hidden * 2;
  MK_ASSIGN_OR_RETURN(const auto memory, MakeGpuRowMemory(row_bytes, (1 + kSumsEach) * batch, 1));
  MK_ASSIGN_OR_RETURN(const auto combiner, MakeGpuRowCombiner(hidden, batch, kSumsEach));
  MK_ASSIGN_OR_RETURN(const auto lane, attention.MakeBatch());
  MK_ASSIGN_OR_RETURN(DeviceBuffer sums, DeviceBuffer::Allocate(batch * hidden * 4));
  MK_RETURN_IF_ERROR(sums.Fill(0, attention.stream()));
  MK_ASSIGN_OR_RETURN(
      const std::unique_ptr<DecodeSegments> segments,
      DecodeSegments::Create(attention, *lane, sums.as<float>(), nullptr,
                             {.buckets = {batch}, .context_max = context_max, .on_device = true}));
  const auto prepare = [&]() -> absl::Status {
    MK_RETURN_IF_ERROR(segments->Begin(inputs));
    for (int32_t layer = 0; layer < kFirstMeasured; ++layer) {
      MK_RETURN_IF_ERROR(segments->Attention(layer));
      MK_RETURN_IF_ERROR(segments->FeedForward(layer));
    }
    return absl::OkStatus();
  };
  std::vector<transport::RowCopy> copies;
  std::vector<int32_t> begin = {0};
  std::vector<PartialSum> partials;
  for (int row = 0; row < batch; ++row) {
    const auto* normed = reinterpret_cast<const std::byte*>(lane->normed()) + row * row_bytes;
    copies.push_back({memory->base() + row * row_bytes, normed});
    for (int i = 0; i < kSumsEach; ++i) {
      partials.push_back({memory->base() + (batch + row * kSumsEach + i) * row_bytes, false});
      copies.push_back({memory->base() + (batch + row * kSumsEach + i) * row_bytes, normed});
    }
    begin.push_back(static_cast<int32_t>(partials.size()));
  }
  // Numbers for what experts would have sent.
  MK_RETURN_IF_ERROR(prepare());
  MK_RETURN_IF_ERROR(attention.Synchronize());
  MK_RETURN_IF_ERROR(memory->CopyRows(copies));
  std::erase_if(copies, [&](const transport::RowCopy& copy) { return memory->RowNumber(copy.to) >= batch; });
  const auto run = [&]() -> absl::Status {
    for (int32_t layer = kFirstMeasured; layer < kLayers; ++layer) {
      MK_RETURN_IF_ERROR(segments->Attention(layer));
      MK_RETURN_IF_ERROR(attention.Synchronize());
      MK_RETURN_IF_ERROR(memory->CopyRows(copies));
      MK_RETURN_IF_ERROR(segments->FeedForward(layer));
      MK_RETURN_IF_ERROR(combiner->Combine(begin, partials, sums.as<float>()));
    }
    return absl::OkStatus();
  };
  return HostMilliseconds(attention.stream(), prepare, run);
}

absl::Status RunCrossing(const ModelCalls& calls, const std::string& work, int batch, const Stream& stream) {
  constexpr int64_t kContext = 4096, kPagesEach = kContext / 64 + 1;
  const ModelConfig c = ShapeOf(true, kLayers);
  RandomSource source;
  MK_ASSIGN_OR_RETURN(cuda_model::AttentionWeights weights,
                      cuda_model::AttentionWeights::Load(c, source, stream, [](int32_t) {}));
  AttentionOnGpu::Options options;
  options.rows_max = options.sequences_max = batch;
  options.cache_pages = batch * kPagesEach;
  options.prefill_keys_max = 1024;
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<AttentionOnGpu> attention,
                      AttentionOnGpu::Create(std::move(weights), options));
  MK_RETURN_IF_ERROR(FillCache(*attention));
  const auto pages = ScatteredPages(batch, kPagesEach);
  const int64_t values = batch * int64_t{c.hidden_size};
  const Stream& gpu = attention->stream();

  // All of it in one graph: the sums are on the device, as if the experts were.
  MK_ASSIGN_OR_RETURN(const auto rows, DecodingBatch(*attention, batch, kContext, pages));
  MK_ASSIGN_OR_RETURN(DeviceBuffer sums, DeviceBuffer::Allocate(values * 4));
  MK_ASSIGN_OR_RETURN(DeviceBuffer begin, DeviceBuffer::Allocate((batch + 1) * 4));
  std::vector<int32_t> one_per_row(batch + 1);
  std::iota(one_per_row.begin(), one_per_row.end(), 0);
  MK_RETURN_IF_ERROR(sums.Fill(0, gpu));
  MK_RETURN_IF_ERROR(begin.Upload(one_per_row.data(), begin.bytes(), gpu));
  const auto together = [&]() -> absl::Status {
    for (int32_t layer = kFirstMeasured; layer < kLayers; ++layer) {
      MK_RETURN_IF_ERROR(
          cuda::AddPartialRows(rows->x(), batch, c.hidden_size, begin.as<int32_t>(), sums.as<float>(), gpu));
      MK_RETURN_IF_ERROR(attention->Attention(layer, *rows));
      MK_RETURN_IF_ERROR(attention->FeedForward(layer, *rows));
    }
    return absl::OkStatus();
  };
  MK_RETURN_IF_ERROR(together());
  MK_RETURN_IF_ERROR(gpu.Synchronize());
  MK_ASSIGN_OR_RETURN(const cuda::Graph graph, cuda::Graph::Capture(gpu, together));
  MK_ASSIGN_OR_RETURN(const double one_graph,
                      HostMilliseconds(
                          gpu, [] { return absl::OkStatus(); }, [&] { return graph.Launch(gpu); }));

  // As a node does it, with experts that answer at once: rows out of page-locked memory into a message, sums
  // into page-locked memory.
  MK_ASSIGN_OR_RETURN(const cuda::PinnedBuffer sums_host, cuda::PinnedBuffer::Allocate(values * 4));
  MK_ASSIGN_OR_RETURN(const cuda::PinnedBuffer normed, cuda::PinnedBuffer::Allocate(values * 2));
  std::memset(sums_host.as(), 0, sums_host.bytes());
  MK_ASSIGN_OR_RETURN(const auto lane, attention->MakeBatch());
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<DecodeSegments> segments,
                      DecodeSegments::Create(*attention, *lane, sums_host.as<float>(), normed.as<bf16>(),
                                             {.buckets = {batch}, .context_max = kPagesEach * 64}));
  std::vector<cuda_model::DecodeInput> inputs;
  for (int i = 0; i < batch; ++i) inputs.push_back({17, kContext - 1, pages[i], {}});
  std::vector<bf16> message(values);
  const std::vector<float> answers(values, 0.0f);
  MK_ASSIGN_OR_RETURN(const double crossing,
                      HostMilliseconds(
                          gpu,
                          [&]() -> absl::Status {
                            MK_RETURN_IF_ERROR(segments->Begin(inputs));
                            for (int32_t layer = 0; layer < kFirstMeasured; ++layer) {
                              MK_RETURN_IF_ERROR(segments->Attention(layer));
                              MK_RETURN_IF_ERROR(segments->FeedForward(layer));
                            }
                            return absl::OkStatus();
                          },
                          [&]() -> absl::Status {
                            for (int32_t layer = kFirstMeasured; layer < kLayers; ++layer) {
                              MK_RETURN_IF_ERROR(segments->Attention(layer));
                              MK_RETURN_IF_ERROR(attention->Synchronize());
                              std::memcpy(message.data(), normed.as(), values * sizeof(bf16));
                              MK_RETURN_IF_ERROR(segments->FeedForward(layer));
                              std::memcpy(sums_host.as(), answers.data(), values * sizeof(float));
                            }
                            return absl::OkStatus();
                          }));
  MK_ASSIGN_OR_RETURN(const double on_device, RowsOnDevice(*attention, batch, inputs, kPagesEach * 64));
  const double shared = 12.0 * c.hidden_size * c.moe_intermediate_size;
  calls.report({work + ", one graph", one_graph, 0, shared, 0});
  calls.report({work + ", segments", crossing, 0, shared, 0});
  calls.report({work + ", rows in GPU memory", on_device, 0, shared, 0});
  char text[96];
  std::snprintf(text, sizeof(text), "  crossing to the host: %.1f us a layer", 1e3 * (crossing - one_graph));
  calls.report({text, crossing - one_graph, 0, values * 6.0, 0});
  return absl::OkStatus();
}

}  // namespace

void RunCrossingCases(const ModelCalls& calls, const Stream& stream) {
  for (const int batch : {1, 16, 128}) {
    const std::string work = "V2 node across the host, a layer, B=" + std::to_string(batch);
    if (!calls.wanted(work)) continue;
    if (const absl::Status status = RunCrossing(calls, work, batch, stream); !status.ok()) {
      calls.fail(work, status);
    }
  }
}

}  // namespace minke::bench
