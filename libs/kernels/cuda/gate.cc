#include "libs/kernels/cuda/gate.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"
#include "libs/kernels/cuda/gate_kernels.h"
#include "libs/kernels/cuda/tensor_map.h"

namespace minke::cuda {
namespace {

constexpr int kSplitsMax = 40, kSplitsOfManyMax = 8;

struct GatePlan {
  int tile_rows, tiles, splits, k_steps;
};

// About as many blocks as multiprocessors, but every part's logits are written and read back.
GatePlan PlanGate(int64_t rows, int32_t experts, int32_t hidden, int multiprocessors) {
  GatePlan plan;
  // A tile of 128 rows reads the weights half as often as one of 64; small batches need many blocks more than
  // that.
  plan.tile_rows = rows <= 128 ? 16 : rows <= 2048 || experts > 160 ? 64 : 128;
  plan.tiles = static_cast<int>((rows + plan.tile_rows - 1) / plan.tile_rows);
  const int steps = (hidden + kGateStep - 1) / kGateStep;
  const int splits = std::clamp(multiprocessors / plan.tiles, 1,
                                std::min(plan.tile_rows == 16 ? kSplitsMax : kSplitsOfManyMax, steps));
  plan.k_steps = (steps + splits - 1) / splits;
  plan.splits = (steps + plan.k_steps - 1) / plan.k_steps;
  return plan;
}

}  // namespace

absl::StatusOr<Gate> Gate::Create(const Options& o) {
  if (o.experts < 1 || o.experts > 256 || o.hidden < 8 || o.hidden % 8 != 0 || o.k < 1 || o.k > 32 ||
      o.k > o.experts || o.groups < 1 || o.groups > 32 || o.experts % o.groups != 0 || o.topk_groups < 1 ||
      o.topk_groups > o.groups || o.k > o.experts / o.groups * o.topk_groups || o.rows_max < 1) {
    return absl::InvalidArgumentError(absl::StrCat("Gate: ", o.experts, " experts, hidden ", o.hidden,
                                                   ", top ", o.k, ", ", o.topk_groups, " of ", o.groups,
                                                   " groups, ", o.rows_max, " rows"));
  }
  Gate gate;
  gate.options_ = o;
  absl::StatusOr<DeviceInfo> device = CurrentDevice();
  if (!device.ok()) return device.status();
  gate.device_ = *device;
  absl::StatusOr<Path> path = Resolve(o.path, *device);
  if (!path.ok()) return path.status();
  gate.path_ = *path;
  // Tiles are split only while that gives no more blocks than multiprocessors.
  const int64_t blocks_max = std::max<int64_t>((o.rows_max + 127) / 128, device->multiprocessors);
  gate.partial_values_ = blocks_max * 128 * GateColumns(o.experts);
  absl::StatusOr<DeviceBuffer> partials = DeviceBuffer::Allocate(gate.partial_values_ * 4);
  if (!partials.ok()) return partials.status();
  gate.partials_ = *std::move(partials);
  return gate;
}

absl::Status Gate::Run(const GateArgs& args, const Stream& stream) {
  if (args.rows == 0) return absl::OkStatus();
  if (args.rows > options_.rows_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("Gate: ", args.rows, " rows, room for ", options_.rows_max));
  }
  const GatePlan plan = PlanGate(args.rows, options_.experts, options_.hidden, device_.multiprocessors);
  if (int64_t{plan.tiles} * plan.splits * plan.tile_rows * GateColumns(options_.experts) > partial_values_) {
    return absl::InternalError("Gate: workspace");
  }
  GateParams params;
  params.args = args;
  params.experts = options_.experts;
  params.hidden = options_.hidden;
  params.k = options_.k;
  params.groups = options_.groups;
  params.topk_groups = options_.topk_groups;
  params.scale = options_.scale;
  params.normalise = options_.normalise && options_.k > 1;  // as kernels::WeighExperts
  params.splits = plan.splits;
  params.k_steps = plan.k_steps;
  params.partials = partials_.as<float>();
  params.tile_rows = plan.tile_rows;
  if (path_ == Path::kHopper && plan.tile_rows >= 64) {
    const uint64_t row_bytes[1] = {static_cast<uint64_t>(options_.hidden) * 2};
    const uint64_t x_dims[2] = {static_cast<uint64_t>(options_.hidden), static_cast<uint64_t>(args.rows)};
    const uint64_t w_dims[2] = {static_cast<uint64_t>(options_.hidden),
                                static_cast<uint64_t>(options_.experts)};
    const uint32_t x_box[2] = {kGateStep, static_cast<uint32_t>(plan.tile_rows)};
    const uint32_t w_box[2] = {kGateStep, static_cast<uint32_t>(GateColumns(options_.experts))};
    absl::StatusOr<CUtensorMap> x_map = MakeTensorMap(args.x, x_dims, row_bytes, x_box);
    if (!x_map.ok()) return x_map.status();
    absl::StatusOr<CUtensorMap> w_map = MakeTensorMap(args.w, w_dims, row_bytes, w_box);
    if (!w_map.ok()) return w_map.status();
    MK_CUDA_RETURN_IF_ERROR(LaunchLogitsSm90(params, *x_map, *w_map, stream.handle()));
  } else {
    MK_CUDA_RETURN_IF_ERROR(LaunchLogitsPortable(params, stream.handle()));
  }
  MK_CUDA_RETURN_IF_ERROR(LaunchChoose(params, device_.major >= 9, stream.handle()));
  return absl::OkStatus();
}

}  // namespace minke::cuda
