#include "libs/kernels/cuda/mla_prefill.h"

#include <algorithm>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/mla_prefill_kernels.h"
#include "libs/kernels/cuda/tensor_map.h"

namespace minke::cuda {
namespace {

constexpr uint64_t kQueryDim = 192, kNopeDim = 128, kRopeDim = 64, kValueDim = 128;

absl::StatusOr<CUtensorMap> MapRows(const HeadRows& rows, uint64_t width, uint64_t heads, uint64_t count) {
  const uint64_t row_bytes = static_cast<uint64_t>(rows.row) * 2;
  const uint64_t dims[3] = {width, rows.head == 0 ? 1 : heads, count};
  const uint64_t strides[2] = {rows.head == 0 ? row_bytes : static_cast<uint64_t>(rows.head) * 2, row_bytes};
  const uint32_t box[3] = {64, 1, kPrefillTileRows};
  return MakeTensorMap(rows.data, dims, strides, box);
}

}  // namespace

absl::StatusOr<MlaPrefill> MlaPrefill::Create(const Options& options) {
  if (options.heads < 1 || options.heads > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("MlaPrefill: ", options.heads, " heads"));
  }
  MlaPrefill prefill;
  prefill.options_ = options;
  absl::StatusOr<DeviceInfo> device = CurrentDevice();
  if (!device.ok()) return device.status();
  prefill.device_ = *device;
  absl::StatusOr<Path> path = Resolve(options.path, *device);
  if (!path.ok()) return path.status();
  prefill.path_ = *path;
  absl::StatusOr<DeviceBuffer> table = DeviceBuffer::Allocate(options.sequences_max * sizeof(PrefillSpan));
  if (!table.ok()) return table.status();
  prefill.table_ = *std::move(table);
  absl::StatusOr<DeviceBuffer> counters = DeviceBuffer::Allocate(2 * sizeof(int32_t));
  if (!counters.ok()) return counters.status();
  prefill.counters_ = *std::move(counters);
  MK_CUDA_RETURN_IF_ERROR(cudaMemset(prefill.counters_.as(), 0, 2 * sizeof(int32_t)));
  return prefill;
}

absl::Status MlaPrefill::Plan(std::span<const PrefillSequence> sequences, const Stream& stream) {
  if (std::ssize(sequences) > options_.sequences_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("MlaPrefill: ", sequences.size(), " sequences, room for ", options_.sequences_max));
  }
  spans_.clear();
  queries_ = keys_ = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const auto [queries, keys] = sequences[s];
    if (queries < 0 || keys < queries) {
      return absl::InvalidArgumentError(
          absl::StrCat("sequence ", s, " has ", queries, " queries and ", keys, " keys"));
    }
    if (queries > 0) {
      spans_.push_back({static_cast<int32_t>(queries_), queries, static_cast<int32_t>(keys_), keys, 0, {}});
    }
    queries_ += queries;
    keys_ += keys;
  }
  // Tiles are handed out in this order, so the longest are not left for last.
  std::stable_sort(spans_.begin(), spans_.end(),
                   [](const auto& a, const auto& b) { return a.keys > b.keys; });
  const int32_t rows = path_ == Path::kHopper ? kPrefillTileRows : kPrefillPortableTileRows;
  int64_t tiles = 0;
  for (PrefillSpan& span : spans_) {
    span.tile_begin = static_cast<int32_t>(tiles);
    tiles += int64_t{(span.queries + rows - 1) / rows} * options_.heads;
  }
  if (tiles > INT32_MAX / 2) return absl::InvalidArgumentError("MlaPrefill: too many rows in one batch");
  tiles_ = static_cast<int32_t>(tiles);
  return table_.Upload(spans_.data(), std::ssize(spans_) * sizeof(PrefillSpan), stream);
}

absl::Status MlaPrefill::Run(const MlaPrefillArgs& args, const Stream& stream) {
  if (tiles_ == 0) return absl::OkStatus();
  PrefillParams params;
  params.q = args.q;
  params.k = args.k;
  params.k_rope = args.k_rope;
  params.v = args.v;
  params.out = args.out;
  params.lse = args.lse;
  params.spans = table_.as<PrefillSpan>();
  params.counters = counters_.as<int32_t>();
  params.span_count = static_cast<int32_t>(spans_.size());
  params.tiles = tiles_;
  params.heads = options_.heads;
  params.scale_log2 = options_.softmax_scale * std::numbers::log2e_v<float>;
  if (path_ == Path::kPortable) {
    MK_CUDA_RETURN_IF_ERROR(LaunchPrefillPortable(params, stream.handle()));
    return absl::OkStatus();
  }
  const uint64_t heads = options_.heads, keys = keys_;
  const HeadRows q = {args.q, static_cast<int64_t>(heads * kQueryDim), static_cast<int64_t>(kQueryDim)};
  absl::StatusOr<CUtensorMap> q_map = MapRows(q, kQueryDim, heads, queries_);
  absl::StatusOr<CUtensorMap> k_map = MapRows(args.k, kNopeDim, heads, keys);
  absl::StatusOr<CUtensorMap> k_rope_map = MapRows(args.k_rope, kRopeDim, heads, keys);
  absl::StatusOr<CUtensorMap> v_map = MapRows(args.v, kValueDim, heads, keys);
  for (const auto* map : {&q_map, &k_map, &k_rope_map, &v_map}) {
    if (!map->ok()) return map->status();
  }
  const PrefillMaps maps = {*q_map, *k_map, *k_rope_map, *v_map};
  MK_CUDA_RETURN_IF_ERROR(LaunchPrefillSm90(params, maps, std::min(device_.multiprocessors, tiles_),
                                            options_.variant, stream.handle()));
  return absl::OkStatus();
}

}  // namespace minke::cuda
