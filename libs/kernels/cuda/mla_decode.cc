#include "libs/kernels/cuda/mla_decode.h"

#include <cstring>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/mla_decode_kernels.h"
#include "libs/kernels/cuda/tensor_map.h"

namespace minke::cuda {
namespace {

constexpr int kPageTokens = 64;
constexpr int kTileRows = 64;      // of the Hopper kernel: one wgmma tile of query rows per block
constexpr int kPortableRows = 16;  // one mma.sync tile
constexpr int kFewSplits = 4;      // up to here one warp adds up a row, beyond it eight do
constexpr int64_t kQueriesMax = 4;

int64_t AlignUp(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Where the plan's tables lie in their buffer.
struct Tables {
  explicit Tables(int64_t workers)
      : worker_begin(256),
        combines(worker_begin + AlignUp((workers + 1) * 4)),
        segments(combines + AlignUp(workers * sizeof(DecodeCombine))) {}
  int64_t header = 0;
  int64_t worker_begin, combines, segments;
};

}  // namespace

absl::StatusOr<MlaDecode> MlaDecode::Create(const Options& options) {
  if (options.heads < 16 || options.heads > 128 || options.heads % 16 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("MlaDecode: ", options.heads, " heads"));
  }
  MlaDecode decode;
  decode.options_ = options;
  absl::StatusOr<DeviceInfo> device = CurrentDevice();
  if (!device.ok()) return device.status();
  decode.device_ = *device;
  absl::StatusOr<Path> path = Resolve(options.path, *device);
  if (!path.ok()) return path.status();
  decode.path_ = *path;
  MlaDecodePlanLimits& limits = decode.limits_;
  limits.heads = options.heads;
  if (options.combine_cost != 0) limits.combine_cost = options.combine_cost;
  if (decode.path_ == Path::kHopper) {
    // Both halves of 128 heads read the same pages: two blocks share every load.
    decode.blocks_per_worker_ = options.heads == 128 && options.variant == 0 ? 2 : 1;
    limits.item_rows = kTileRows * decode.blocks_per_worker_;
    limits.workers = device->multiprocessors / decode.blocks_per_worker_;
  } else {
    limits.item_rows = kPortableRows;
    limits.workers = 2 * device->multiprocessors;
  }
  decode.items_max_ =
      options.sequences_max * ((kQueriesMax * options.heads + limits.item_rows - 1) / limits.item_rows);
  const int64_t splits = 2 * limits.workers;
  const auto allocate = [&](DeviceBuffer& buffer, int64_t bytes) {
    absl::StatusOr<DeviceBuffer> made = DeviceBuffer::Allocate(bytes);
    if (made.ok()) buffer = *std::move(made);
    return made.status();
  };
  const int64_t table_bytes =
      Tables(limits.workers).segments + (decode.items_max_ + limits.workers) * sizeof(DecodeSegment);
  if (absl::Status s = allocate(decode.tables_, table_bytes); !s.ok()) return s;
  if (absl::Status s = allocate(decode.partials_, splits * limits.item_rows * kLatentRank * 4); !s.ok())
    return s;
  if (absl::Status s = allocate(decode.sums_, splits * limits.item_rows * 4); !s.ok()) return s;
  return decode;
}

absl::Status MlaDecode::Plan(std::span<const DecodeSequence> sequences, const Stream& stream) {
  if (std::ssize(sequences) > options_.sequences_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("MlaDecode: ", sequences.size(), " sequences, room for ", options_.sequences_max));
  }
  absl::StatusOr<MlaDecodePlan> plan = PlanMlaDecode(sequences, limits_);
  if (!plan.ok()) return plan.status();
  plan_ = *std::move(plan);
  const Tables at(limits_.workers);
  const int64_t bytes = at.segments + std::ssize(plan_.segments) * sizeof(DecodeSegment);
  staging_.assign(bytes, 0);
  const int32_t header[2] = {static_cast<int32_t>(plan_.combines.size()),
                             plan_.splits_max <= kFewSplits ? 1 : 8};
  const auto put = [&](int64_t offset, const auto* values, size_t count) {
    std::memcpy(staging_.data() + offset, values, count * sizeof(*values));
  };
  put(at.header, header, 2);
  put(at.worker_begin, plan_.worker_begin.data(), plan_.worker_begin.size());
  put(at.combines, plan_.combines.data(), plan_.combines.size());
  put(at.segments, plan_.segments.data(), plan_.segments.size());
  return tables_.Upload(staging_.data(), bytes, stream);
}

absl::Status MlaDecode::Run(const MlaDecodeArgs& args, const Stream& stream) {
  if (plan_.tokens == 0) return absl::OkStatus();
  DecodeParams params;
  params.q = args.q;
  params.cache = args.cache;
  params.page_table = args.page_table;
  params.page_table_stride = args.page_table_stride;
  params.out = args.out;
  params.lse = args.lse;
  params.partials = partials_.as<float>();
  params.sums = sums_.as<float>();
  const Tables at(limits_.workers);
  const char* tables = tables_.as<char>();
  params.worker_begin = reinterpret_cast<const int32_t*>(tables + at.worker_begin);
  params.segments = reinterpret_cast<const DecodeSegment*>(tables + at.segments);
  params.scale_log2 = options_.softmax_scale * std::numbers::log2e_v<float>;
  params.heads = options_.heads;
  params.item_rows = limits_.item_rows;
  if (path_ == Path::kHopper) {
    const uint64_t row_bytes[1] = {kLatentDim * 2};
    const uint64_t q_dims[2] = {kLatentDim, static_cast<uint64_t>(plan_.tokens * options_.heads)};
    const uint64_t page_dims[2] = {kLatentDim, static_cast<uint64_t>(args.cache_pages) * kPageTokens};
    const uint32_t q_box[2] = {64, kTileRows};
    // Each block of a pair fetches half of a page's rows for both.
    const uint32_t page_box[2] = {64, static_cast<uint32_t>(kPageTokens / blocks_per_worker_)};
    absl::StatusOr<CUtensorMap> q_map = MakeTensorMap(args.q, q_dims, row_bytes, q_box);
    if (!q_map.ok()) return q_map.status();
    absl::StatusOr<CUtensorMap> page_map = MakeTensorMap(args.cache, page_dims, row_bytes, page_box);
    if (!page_map.ok()) return page_map.status();
    MK_CUDA_RETURN_IF_ERROR(
        LaunchDecodeSm90(params, *q_map, *page_map, limits_.workers, blocks_per_worker_, stream.handle()));
  } else {
    MK_CUDA_RETURN_IF_ERROR(LaunchDecodePortable(params, limits_.workers, stream.handle()));
  }
  // Launched whether or not this batch has something to combine: a captured graph serves later batches too.
  CombineParams combine;
  combine.out = args.out;
  combine.lse = args.lse;
  combine.partials = params.partials;
  combine.sums = params.sums;
  combine.header = reinterpret_cast<const int32_t*>(tables + at.header);
  combine.combines = reinterpret_cast<const DecodeCombine*>(tables + at.combines);
  combine.item_rows = limits_.item_rows;
  MK_CUDA_RETURN_IF_ERROR(
      LaunchDecodeCombine(combine, 2 * device_.multiprocessors, path_ == Path::kHopper, stream.handle()));
  return absl::OkStatus();
}

}  // namespace minke::cuda
