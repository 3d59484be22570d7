#include "libs/kernels/cuda/grouped_ffn.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/grouped_ffn_kernels.h"

namespace minke::cuda {
namespace {

absl::Status Validate(const GroupedFfnShape& shape) {
  if (shape.experts < 1 || shape.experts > kGroupedFfnExpertsMax || shape.hidden < 8 ||
      shape.hidden % 8 != 0 || shape.inner < 8 || shape.inner % 8 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("grouped FFN: ", shape.experts, " experts, hidden ",
                                                   shape.hidden, ", inner ", shape.inner));
  }
  return absl::OkStatus();
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Where the planning kernel's tables begin in their buffer, in bytes.
struct TableOffsets {
  int64_t experts = 0, done, counters, pair_source, position, block_counts, end;
  TableOffsets(int64_t expert_count, int64_t pairs) {
    done = (expert_count + 1) * static_cast<int64_t>(sizeof(FfnExpert));
    counters = done + expert_count * 4;
    pair_source = counters + 2 * 4;
    position = pair_source + pairs * 4;
    block_counts = position + pairs * 4;
    end = block_counts + kFfnPlanBlocksMax * expert_count * 4;
  }
};

}  // namespace

int64_t GroupedFfnWeights::Bytes(const GroupedFfnShape& shape, FfnFormat format) {
  const FfnUnits units = UnitsOf(shape, format);
  return int64_t{FfnBlockBytes(format)} * shape.experts *
         (int64_t{units.units1} * units.blocks1 + int64_t{units.units2} * units.blocks2);
}

absl::StatusOr<GroupedFfnWeights> GroupedFfnWeights::Create(const GroupedFfnShape& shape, FfnFormat format) {
  if (absl::Status s = Validate(shape); !s.ok()) return s;
  const FfnUnits units = UnitsOf(shape, format);
  GroupedFfnWeights weights;
  weights.shape_ = shape;
  weights.format_ = format;
  const int64_t block = int64_t{FfnBlockBytes(format)} * shape.experts;
  absl::StatusOr<DeviceBuffer> gate_up = DeviceBuffer::Allocate(block * units.units1 * units.blocks1);
  if (!gate_up.ok()) return gate_up.status();
  absl::StatusOr<DeviceBuffer> down = DeviceBuffer::Allocate(block * units.units2 * units.blocks2);
  if (!down.ok()) return down.status();
  weights.gate_up_ = *std::move(gate_up);
  weights.down_ = *std::move(down);
  return weights;
}

absl::Status GroupedFfnWeights::Load(int32_t expert, const bf16* gate, const bf16* up, const bf16* down,
                                     const Stream& stream) {
  if (expert < 0 || expert >= shape_.experts) {
    return absl::OutOfRangeError(absl::StrCat("expert ", expert, " of ", shape_.experts));
  }
  for (const bf16* matrix : {gate, up, down}) {
    if (matrix == nullptr || !Aligned(matrix))
      return absl::InvalidArgumentError("expert weights: null or unaligned");
  }
  const FfnUnits units = UnitsOf(shape_, format_);
  FfnPackParams params;
  params.format = format_;
  params.first = gate;
  params.second = up;
  params.to = gate_up_.as<uint8_t>() + gate_up_.bytes() / shape_.experts * expert;
  params.rows = shape_.inner;
  params.columns = shape_.hidden;
  params.units = units.units1;
  params.blocks = units.blocks1;
  MK_CUDA_RETURN_IF_ERROR(LaunchFfnPack(params, stream.handle()));
  params.first = down;
  params.second = nullptr;
  params.to = down_.as<uint8_t>() + down_.bytes() / shape_.experts * expert;
  params.rows = shape_.hidden;
  params.columns = shape_.inner;
  params.units = units.units2;
  params.blocks = units.blocks2;
  MK_CUDA_RETURN_IF_ERROR(LaunchFfnPack(params, stream.handle()));
  return absl::OkStatus();
}

absl::Status GroupedFfnWeights::ReadPacked(int64_t begin, std::span<std::byte> out,
                                           const Stream& stream) const {
  const int64_t first = std::clamp<int64_t>(gate_up_.bytes() - begin, 0, std::ssize(out));
  if (first > 0) {
    if (absl::Status s = gate_up_.Download(out.data(), first, stream, begin); !s.ok()) return s;
  }
  if (first == std::ssize(out)) return absl::OkStatus();
  return down_.Download(out.data() + first, std::ssize(out) - first, stream,
                        begin + first - gate_up_.bytes());
}

absl::Status GroupedFfnWeights::WritePacked(int64_t begin, std::span<const std::byte> bytes,
                                            const Stream& stream) {
  const int64_t first = std::clamp<int64_t>(gate_up_.bytes() - begin, 0, std::ssize(bytes));
  if (first > 0) {
    if (absl::Status s = gate_up_.Upload(bytes.data(), first, stream, begin); !s.ok()) return s;
  }
  if (first == std::ssize(bytes)) return absl::OkStatus();
  return down_.Upload(bytes.data() + first, std::ssize(bytes) - first, stream,
                      begin + first - gate_up_.bytes());
}

absl::Status GroupedFfnWeights::Upload(int32_t expert, const bf16* gate, const bf16* up, const bf16* down,
                                       DeviceBuffer& staging, const Stream& stream) {
  const int64_t values = int64_t{shape_.hidden} * shape_.inner;
  if (staging.bytes() < 3 * values * 2) {
    // What is being read from the old buffer must be over before it goes.
    if (absl::Status s = stream.Synchronize(); !s.ok()) return s;
    absl::StatusOr<DeviceBuffer> grown = DeviceBuffer::Allocate(3 * values * 2);
    if (!grown.ok()) return grown.status();
    staging = *std::move(grown);
  }
  const bf16* matrices[3] = {gate, up, down};
  for (int i = 0; i < 3; ++i) {
    if (matrices[i] == nullptr) return absl::InvalidArgumentError("expert weights: null");
    if (absl::Status s = staging.Upload(matrices[i], values * 2, stream, i * values * 2); !s.ok()) return s;
  }
  const bf16* at = staging.as<bf16>();
  return Load(expert, at, at + values, at + 2 * values, stream);
}

absl::StatusOr<GroupedFfn> GroupedFfn::Create(const Options& options) {
  if (absl::Status s = Validate(options.shape); !s.ok()) return s;
  const int64_t pairs = int64_t{options.outputs_max} * options.slots;
  if (options.slots < 1 || options.slots > 32 || options.outputs_max < 1 || pairs > (1 << 24)) {
    return absl::InvalidArgumentError(
        absl::StrCat("grouped FFN: ", options.slots, " slots, ", options.outputs_max, " outputs"));
  }
  GroupedFfn ffn;
  ffn.options_ = options;
  absl::StatusOr<DeviceInfo> device = CurrentDevice();
  if (!device.ok()) return device.status();
  ffn.device_ = *device;
  absl::StatusOr<Path> path = Resolve(options.path, *device);
  if (!path.ok()) return path.status();
  ffn.path_ = *path;
  const auto allocate = [](DeviceBuffer& buffer, int64_t bytes) {
    absl::StatusOr<DeviceBuffer> made = DeviceBuffer::Allocate(bytes);
    if (made.ok()) buffer = *std::move(made);
    return made.status();
  };
  const FfnUnits units = UnitsOf(options.shape, options.format);
  int64_t inner_bytes = pairs * units.blocks2 * FfnBlockColumns(options.format) * 2;
  if (ffn.splits()) {
    inner_bytes = (pairs + 8 * options.shape.experts) * units.blocks2 * kFfnSplitPairBytes;
    const int64_t parts = int64_t{options.outputs_max} * 2 * 128 * units.blocks1;
    if (absl::Status s = allocate(ffn.parts_, parts); !s.ok()) return s;
    if (absl::Status s = allocate(ffn.part_scales_, int64_t{options.outputs_max} * 4); !s.ok()) return s;
  }
  if (absl::Status s = allocate(ffn.tables_, TableOffsets(options.shape.experts, pairs).end); !s.ok())
    return s;
  if (absl::Status s = allocate(ffn.inner_, inner_bytes); !s.ok()) return s;
  if (absl::Status s = allocate(ffn.pairs_, pairs * options.shape.hidden * 2); !s.ok()) return s;
  return ffn;
}

absl::Status GroupedFfn::Run(const GroupedFfnArgs& args, const Stream& stream) {
  const GroupedFfnShape& shape = options_.shape;
  if (args.outputs == 0) return absl::OkStatus();
  if (args.outputs < 0 || args.outputs > options_.outputs_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("grouped FFN: ", args.outputs, " outputs, room for ", options_.outputs_max));
  }
  if (args.weights == nullptr || !(args.weights->shape() == shape)) {
    return absl::InvalidArgumentError("grouped FFN: no weights, or of another shape");
  }
  if (args.weights->format() != options_.format) {
    return absl::InvalidArgumentError("grouped FFN: weights of another format");
  }
  if (args.x == nullptr || args.experts == nullptr || args.slot_weights == nullptr ||
      (args.partial == nullptr) == (args.x_residual == nullptr)) {
    return absl::InvalidArgumentError("grouped FFN: a pointer is missing, or both outputs are given");
  }
  if (!Aligned(args.x) || !Aligned(args.partial) || !Aligned(args.x_residual)) {
    return absl::InvalidArgumentError("grouped FFN: activations must be 16-byte aligned");
  }
  const TableOffsets at(shape.experts, int64_t{options_.outputs_max} * options_.slots);
  uint8_t* tables = tables_.as<uint8_t>();
  FfnPlanParams plan;
  plan.tables.experts = reinterpret_cast<FfnExpert*>(tables + at.experts);
  plan.tables.done = reinterpret_cast<int32_t*>(tables + at.done);
  plan.tables.counters = reinterpret_cast<int32_t*>(tables + at.counters);
  plan.tables.pair_source = reinterpret_cast<int32_t*>(tables + at.pair_source);
  plan.tables.position = reinterpret_cast<int32_t*>(tables + at.position);
  plan.tables.block_counts = reinterpret_cast<int32_t*>(tables + at.block_counts);
  plan.outputs_used = args.outputs_used;
  plan.source = args.source;
  plan.expert_of = args.experts;
  plan.experts = shape.experts;
  plan.outputs = args.outputs;
  plan.slots = options_.slots;
  const FfnFormat format = args.weights->format();
  plan.units = UnitsOf(shape, format);
  const int32_t slots = args.outputs * options_.slots;
  plan.block_slots = std::max(kFfnPlanSlots, (slots + kFfnPlanBlocksMax - 1) / kFfnPlanBlocksMax);
  plan.tile_rows = FfnTileRows(format);
  plan.clusters = device_.multiprocessors / 2;
  plan.solo_units = options_.variant;
  plan.split = {};
  if (splits()) {
    // Pairs are then of the outputs' parts, whatever rows those came from.
    plan.source = nullptr;
    plan.split = {.x = args.x,
                  .source = args.source,
                  .parts = parts_.as<uint8_t>(),
                  .scales = part_scales_.as<float>(),
                  .hidden = shape.hidden,
                  .blocks = plan.units.blocks1};
  }
  MK_CUDA_RETURN_IF_ERROR(LaunchFfnPlan(plan, path_ == Path::kHopper, stream.handle()));

  FfnParams params;
  params.tables = plan.tables;
  params.x = args.x;
  params.parts = plan.split.parts;
  params.part_scales = plan.split.scales;
  params.gate_up = args.weights->gate_up();
  params.down = args.weights->down();
  params.inner = inner_.as<uint8_t>();
  params.pairs = pairs_.as<uint16_t>();
  params.expert_of = args.experts;
  params.slots = slots;
  params.experts = shape.experts;
  params.hidden = shape.hidden;
  params.units = plan.units;
  if (path_ == Path::kHopper) {
    MK_CUDA_RETURN_IF_ERROR(LaunchFfnSm90(params, format, device_.multiprocessors, stream.handle()));
  } else {
    MK_CUDA_RETURN_IF_ERROR(LaunchFfnPortable(params, format, device_.multiprocessors, stream.handle()));
  }

  FfnReduceParams reduce;
  reduce.position = plan.tables.position;
  reduce.outputs_used = args.outputs_used;
  reduce.slot_weights = args.slot_weights;
  reduce.pairs = params.pairs;
  reduce.inner = inner_.as<uint8_t>();
  reduce.partial = args.partial;
  reduce.partial_rows = args.partial_rows;
  reduce.finite = args.partial != nullptr ? args.finite : nullptr;
  reduce.x_residual = args.x_residual;
  reduce.outputs = args.outputs;
  reduce.slots = options_.slots;
  reduce.hidden = shape.hidden;
  reduce.experts = plan.tables.experts;
  reduce.expert_count = shape.experts;
  reduce.inner_pair_bytes = static_cast<int32_t>(
      plan.units.blocks2 * (splits() ? kFfnSplitPairBytes : int64_t{FfnBlockColumns(format)} * 2));
  reduce.inner_pairs_more = splits() ? 8 * shape.experts : 0;
  MK_CUDA_RETURN_IF_ERROR(LaunchFfnReduce(reduce, path_ == Path::kHopper, stream.handle()));
  return absl::OkStatus();
}

}  // namespace minke::cuda
