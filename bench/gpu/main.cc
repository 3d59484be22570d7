// Kernels on one GPU, beside its ceilings. Random data, rotating inputs, medians of 20 after 5 warm-ups.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>

#include "bench/gpu/ceilings.h"
#include "bench/gpu/crossing_cases.h"
#include "bench/gpu/ffn_cases.h"
#include "bench/gpu/fill.h"
#include "bench/gpu/measure.h"
#include "bench/gpu/model_cases.h"
#include "libs/kernels/cuda/mla_decode.h"
#include "libs/kernels/cuda/mla_prefill.h"
#include "nlohmann/json.hpp"

namespace minke::bench {
namespace {

using cuda::DeviceBuffer;
using cuda::Stream;

constexpr float kScale = 0.1147213868f;

struct Flags {
  std::string filter, json;
  bool variants = false, portable = false;
};

struct Row {
  std::string work;
  double ms = 0, tflops = 0, gbps = 0;
  // At most one target: a rate to reach or a time to stay under.
  double target_tflops = 0, target_gbps = 0, target_ms = 0;
};

struct Bench {
  Flags flags;
  Stream stream;
  double copy = 0, product = 0;
  nlohmann::json rows = nlohmann::json::array();
  bool failed = false;

  bool Wanted(const std::string& work) const { return work.find(flags.filter) != std::string::npos; }

  void Report(const Row& row) {
    std::string target = "-";
    bool reached = true;
    char text[64];
    if (row.target_tflops > 0) {
      std::snprintf(text, sizeof(text), ">= %.0f TFLOP/s", row.target_tflops), target = text;
      reached = row.tflops >= row.target_tflops;
    } else if (row.target_gbps > 0) {
      std::snprintf(text, sizeof(text), ">= %.0f GB/s", row.target_gbps), target = text;
      reached = row.gbps >= row.target_gbps;
    } else if (row.target_ms > 0) {
      std::snprintf(text, sizeof(text), "<= %.3f ms", row.target_ms), target = text;
      reached = row.ms <= row.target_ms;
    }
    std::printf("%-52s %9.4f %8.0f %5.0f%% %8.0f %5.0f%%  %-16s %s\n", row.work.c_str(), row.ms, row.tflops,
                100 * row.tflops / product, row.gbps, 100 * row.gbps / copy, target.c_str(),
                target == "-" ? ""
                : reached     ? "reached"
                              : "missed");
    std::fflush(stdout);
    rows.push_back({{"work", row.work},
                    {"ms", row.ms},
                    {"tflops", row.tflops},
                    {"tflops_of_product", row.tflops / product},
                    {"gbps", row.gbps},
                    {"gbps_of_copy", row.gbps / copy},
                    {"target", target},
                    {"reached", reached}});
  }

  void Fail(const std::string& work, const absl::Status& status) {
    std::printf("%-52s %s\n", work.c_str(), status.ToString().c_str());
    failed = true;
  }
};

absl::StatusOr<DeviceBuffer> Random(int64_t count, uint32_t seed, float deviation, const Stream& stream) {
  absl::StatusOr<DeviceBuffer> buffer = DeviceBuffer::Allocate(count * 2);
  if (!buffer.ok()) return buffer;
  if (absl::Status s = FillNormal(buffer->as<bf16>(), count, seed, deviation, stream); !s.ok()) return s;
  return buffer;
}

struct DecodeCase {
  int batch, heads, context, queries = 1;
  double tflops = 0, gbps = 0, ms = 0;
  bool ragged = false;  // lengths from 1/8 of the context to 15/8
};

absl::Status RunDecode(Bench& bench, const DecodeCase& c, int variant, cuda::Path path,
                       const std::string& work) {
  std::vector<cuda::DecodeSequence> sequences;
  int64_t pages = 0, stride = 0;
  double keys = 0;
  for (int i = 0; i < c.batch; ++i) {
    const int length =
        c.ragged
            ? c.context / 8 + static_cast<int>(int64_t{i} * 7919 % c.batch * (c.context * 7 / 4) / c.batch)
            : c.context;
    sequences.push_back({length, c.queries});
    pages += (length + 63) / 64;
    stride = std::max<int64_t>(stride, (length + 63) / 64);
    keys += length;
  }
  const int64_t tokens = int64_t{c.batch} * c.queries;
  const int64_t page_values = 64 * cuda::kLatentDim, q_values = tokens * c.heads * cuda::kLatentDim,
                out_values = tokens * c.heads * cuda::kLatentRank;
  const int sets = Sets((pages * page_values + q_values) * 2);
  absl::StatusOr<DeviceBuffer> cache = Random(sets * pages * page_values, 1, 1, bench.stream);
  if (!cache.ok()) return cache.status();
  absl::StatusOr<DeviceBuffer> q = Random(sets * q_values, 2, 0.7f, bench.stream);
  if (!q.ok()) return q.status();
  absl::StatusOr<DeviceBuffer> out = DeviceBuffer::Allocate(out_values * 2);
  if (!out.ok()) return out.status();
  // Pages of a sequence lie scattered, as after a while of serving.
  std::vector<uint32_t> table(c.batch * stride), order(pages);
  for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<uint32_t>(i);
  uint32_t state = 12345;
  for (int64_t i = pages - 1; i > 0; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(order[i], order[(state >> 8) % (i + 1)]);
  }
  for (int64_t s = 0, at = 0; s < c.batch; ++s) {
    for (int64_t t = 0; t * 64 < sequences[s].length; ++t) table[s * stride + t] = order[at++];
  }
  absl::StatusOr<DeviceBuffer> table_device = DeviceBuffer::Allocate(std::ssize(table) * 4);
  if (!table_device.ok()) return table_device.status();
  if (absl::Status s = table_device->Upload(table.data(), std::ssize(table) * 4, bench.stream); !s.ok())
    return s;

  cuda::MlaDecode::Options options;
  options.heads = c.heads;
  options.softmax_scale = kScale;
  options.sequences_max = c.batch;
  options.path = path;
  options.variant = variant % 10;
  options.combine_cost = variant >= 200 ? 1 << 20 : variant >= 100 ? -(1 << 20) : 0;
  absl::StatusOr<cuda::MlaDecode> decode = cuda::MlaDecode::Create(options);
  if (!decode.ok()) return decode.status();
  if (absl::Status s = decode->Plan(sequences, bench.stream); !s.ok()) return s;
  absl::StatusOr<double> ms = MedianMilliseconds(sets, bench.stream, [&](int set) {
    cuda::MlaDecodeArgs args;
    args.q = q->as<bf16>() + set * q_values;
    args.cache = cache->as<bf16>() + set * pages * page_values;
    args.cache_pages = pages;
    args.page_table = table_device->as<uint32_t>();
    args.page_table_stride = stride;
    args.out = out->as<bf16>();
    return decode->Run(args, bench.stream);
  });
  if (!ms.ok()) return ms.status();
  Row row;
  row.work = work;
  row.ms = *ms;
  row.tflops = 2.0 * c.heads * c.queries * keys * (576 + 512) / *ms * 1e-9;
  row.gbps = (keys * 1152 + (q_values + out_values) * 2.0) / *ms * 1e-6;
  row.target_tflops = c.tflops;
  row.target_gbps = c.gbps;
  row.target_ms = c.ms;
  bench.Report(row);
  return absl::OkStatus();
}

struct PrefillCase {
  int batch, context, heads, prefix = 0;
  double tflops = 0;
};

absl::Status RunPrefill(Bench& bench, const PrefillCase& c, int variant, cuda::Path path,
                        const std::string& work) {
  const std::vector<cuda::PrefillSequence> sequences(c.batch, {c.context, c.prefix + c.context});
  const int64_t rows = int64_t{c.batch} * c.context, keys = int64_t{c.batch} * (c.prefix + c.context);
  const int64_t q_values = rows * c.heads * 192, k_values = keys * c.heads * 192,
                v_values = keys * c.heads * 128;
  const int sets = std::min(2, Sets((q_values + k_values + v_values) * 2));
  absl::StatusOr<DeviceBuffer> q = Random(sets * q_values, 1, 0.7f, bench.stream);
  if (!q.ok()) return q.status();
  absl::StatusOr<DeviceBuffer> k = Random(sets * k_values, 2, 1, bench.stream);
  if (!k.ok()) return k.status();
  absl::StatusOr<DeviceBuffer> v = Random(sets * v_values, 3, 1, bench.stream);
  if (!v.ok()) return v.status();
  absl::StatusOr<DeviceBuffer> out = DeviceBuffer::Allocate(rows * c.heads * 128 * 2);
  if (!out.ok()) return out.status();
  cuda::MlaPrefill::Options options;
  options.heads = c.heads;
  options.softmax_scale = kScale;
  options.path = path;
  options.variant = variant;
  absl::StatusOr<cuda::MlaPrefill> prefill = cuda::MlaPrefill::Create(options);
  if (!prefill.ok()) return prefill.status();
  if (absl::Status s = prefill->Plan(sequences, bench.stream); !s.ok()) return s;
  absl::StatusOr<double> ms = MedianMilliseconds(sets, bench.stream, [&](int set) {
    cuda::MlaPrefillArgs args;
    const bf16* keys_at = k->as<bf16>() + set * k_values;
    args.q = q->as<bf16>() + set * q_values;
    args.k = {keys_at, int64_t{c.heads} * 192, 192};
    args.k_rope = {keys_at + 128, int64_t{c.heads} * 192, 192};
    args.v = {v->as<bf16>() + set * v_values, int64_t{c.heads} * 128, 128};
    args.out = out->as<bf16>();
    return prefill->Run(args, bench.stream);
  });
  if (!ms.ok()) return ms.status();
  Row row;
  row.work = work;
  row.ms = *ms;
  const double pairs = c.prefix == 0 ? 0.5 * c.context * c.context : c.context * (c.prefix + 0.5 * c.context);
  row.tflops = 2.0 * c.batch * c.heads * pairs * (192 + 128) / *ms * 1e-9;
  row.gbps = (q_values + k_values + v_values + rows * c.heads * 128) * 2.0 / *ms * 1e-6;
  row.target_tflops = c.tflops;
  bench.Report(row);
  return absl::OkStatus();
}

void RunAll(Bench& bench) {
  const auto each = [&](const std::string& work, const std::vector<int>& variants, auto run) {
    if (!bench.Wanted(work)) return;
    const auto report = [&](absl::Status status, const std::string& name) {
      if (!status.ok()) bench.Fail(name, status);
    };
    report(run(0, cuda::Path::kAuto, work), work);
    if (bench.flags.variants) {
      for (const int variant : variants) {
        const std::string name = "  variant " + std::to_string(variant);
        report(run(variant, cuda::Path::kAuto, name), name);
      }
    }
    if (bench.flags.portable) report(run(0, cuda::Path::kPortable, "  portable"), "  portable");
  };
  char name[96];
  const DecodeCase decodes[] = {
      {.batch = 1, .heads = 128, .context = 4096, .ms = 0.035},
      {.batch = 16, .heads = 128, .context = 4096, .ms = 0.065},
      {.batch = 64, .heads = 128, .context = 4096},
      {.batch = 128, .heads = 128, .context = 2048},
      {.batch = 128, .heads = 128, .context = 4096, .tflops = 560},
      {.batch = 128, .heads = 128, .context = 8192, .tflops = 580},
      {.batch = 64, .heads = 128, .context = 32768},
      {.batch = 128, .heads = 128, .context = 4096, .ragged = true},
      {.batch = 32, .heads = 128, .context = 4096, .queries = 2},
      {.batch = 128, .heads = 16, .context = 4096},
      {.batch = 256, .heads = 16, .context = 4096, .gbps = 3900},
      {.batch = 64, .heads = 16, .context = 4096, .queries = 4},
      {.batch = 32, .heads = 64, .context = 8192},
  };
  for (const DecodeCase& c : decodes) {
    std::snprintf(name, sizeof(name), "MLA decode, %d heads, B=%d, context %d%s%s", c.heads, c.batch,
                  c.context, c.ragged ? " ragged" : "",
                  c.queries > 1 ? (", " + std::to_string(c.queries) + " queries").c_str() : "");
    // 1: blocks of 64 rows; 100: sequences are always cut, 200: never.
    each(name, {1, 100, 200}, [&](int variant, cuda::Path path, const std::string& work) {
      return RunDecode(bench, c, variant, path, work);
    });
  }
  const PrefillCase prefills[] = {
      {.batch = 8, .context = 1024, .heads = 128},
      {.batch = 4, .context = 4096, .heads = 128, .tflops = 550},
      {.batch = 1, .context = 8192, .heads = 128, .tflops = 600},
      {.batch = 1, .context = 2048, .heads = 128, .prefix = 6144},
      {.batch = 16, .context = 4096, .heads = 16},
      {.batch = 4, .context = 8192, .heads = 16},
  };
  for (const PrefillCase& c : prefills) {
    std::snprintf(name, sizeof(name), "MLA prefill, %d heads, %d x %d%s", c.heads, c.batch, c.context,
                  c.prefix > 0 ? (" after " + std::to_string(c.prefix)).c_str() : "");
    each(name, {1}, [&](int variant, cuda::Path path, const std::string& work) {
      return RunPrefill(bench, c, variant, path, work);
    });
  }
}

int Main(int argc, char** argv) {
  Flags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--variants") {
      flags.variants = true;
    } else if (flag == "--portable") {
      flags.portable = true;
    } else if (flag == "--filter" && i + 1 < argc) {
      flags.filter = argv[++i];
    } else if (flag == "--json" && i + 1 < argc) {
      flags.json = argv[++i];
    } else {
      std::fprintf(stderr, "usage: gpu_bench [--filter TEXT] [--variants] [--portable] [--json FILE]\n");
      return 2;
    }
  }
  const auto device = cuda::CurrentDevice();
  if (!device.ok()) {
    std::printf("no CUDA device: %s\nNothing was measured.\n",
                std::string(device.status().message()).c_str());
    return 77;
  }
  absl::StatusOr<Stream> stream = Stream::Create();
  if (!stream.ok()) {
    std::fprintf(stderr, "%s\n", stream.status().ToString().c_str());
    return 1;
  }
  Bench bench{flags, *std::move(stream)};
  const absl::StatusOr<double> copy = CopyGBPerSecond(bench.stream),
                               product = ProductTFlopPerSecond(bench.stream);
  if (!copy.ok() || !product.ok()) {
    std::fprintf(stderr, "%s %s\n", copy.status().ToString().c_str(), product.status().ToString().c_str());
    return 1;
  }
  bench.copy = *copy;
  bench.product = *product;
  std::printf("%s: copy %.0f GB/s, bf16 8192^3 product %.0f TFLOP/s\n", device->name.c_str(), bench.copy,
              bench.product);
  std::printf("%-52s %9s %8s %6s %8s %6s  %s\n", "work", "ms", "TFLOP/s", "", "GB/s", "", "target (H200)");
  RunAll(bench);
  const ModelCalls model_calls = {
      [&](const std::string& work) { return bench.Wanted(work); },
      [&](const ModelRow& row) {
        bench.Report(
            {row.work, row.ms, row.flops / row.ms * 1e-9, row.bytes / row.ms * 1e-6, 0, 0, row.target_ms});
      },
      [&](const std::string& work, const absl::Status& status) { bench.Fail(work, status); }, bench.copy};
  RunModelCases(model_calls, bench.stream);
  RunCrossingCases(model_calls, bench.stream);
  const FfnCalls ffn_calls = {
      [&](const std::string& work) { return bench.Wanted(work); },
      [&](const FfnRow& row) {
        bench.Report({row.work, row.ms, row.flops / row.ms * 1e-9, row.bytes / row.ms * 1e-6,
                      row.target_tflops, row.target_gbps, row.target_ms});
      },
      [&](const std::string& work, const absl::Status& status) { bench.Fail(work, status); }};
  RunFfnCases(ffn_calls, flags.variants, flags.portable, bench.stream);
  if (!flags.json.empty()) {
    std::ofstream(flags.json) << nlohmann::json{{"device", device->name},
                                                {"copy_gbps", bench.copy},
                                                {"product_tflops", bench.product},
                                                {"rows", bench.rows}}
                                     .dump(2)
                              << "\n";
  }
  return bench.failed ? 1 : 0;
}

}  // namespace
}  // namespace minke::bench

int main(int argc, char** argv) { return minke::bench::Main(argc, argv); }
