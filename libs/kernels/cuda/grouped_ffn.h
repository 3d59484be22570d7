// SwiGLU feed-forward of many experts in one call. For every output i, over its slots k in ascending order,
//   out_i = sum_k weights[i][k] * down_e(silu(gate_e x_s) * up_e x_s),    e = experts[i][k], s = source[i]
// silu(gate) * up and each pair's down product are rounded to bf16; every product and the sum over slots is
// accumulated in f32. The order of the pairs, the schedule and the counts per expert are made on the device:
// Run never waits for it and may be captured in a CUDA graph. Results do not depend on timing, nor a row's
// result on other rows. Source: arXiv 2405.04434, section 2.2; docs/mathematics.md; docs/gpu_experts.md for
// layout and schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/base/dtype.h"
#include "libs/kernels/cuda/device.h"

namespace minke::cuda {

inline constexpr int32_t kGroupedFfnExpertsMax = 256;

struct GroupedFfnShape {
  int32_t experts = 0;  // 1..kGroupedFfnExpertsMax
  int32_t hidden = 0;   // a multiple of 8; fastest for multiples of 128 (inner: 64)
  int32_t inner = 0;    // a multiple of 8
  friend bool operator==(const GroupedFfnShape&, const GroupedFfnShape&) = default;
};

// kBF16: the weights as they are. kFP8: e4m3 with one scale per block of 128 x 128 weights, made from bf16
// while loading. The scale is the block's largest magnitude / 448, rounded up to four significant bits, so
// that weight times scale is exact in bf16 (magnitudes up to 100,000; a block that holds NaN or infinity
// becomes NaN). Against the bf16 weights, an output row of random weights is off by about 4.5 % (each of the
// three matrices by 2.6 %); against the rounded weights both forms have the same bounds. Hopper multiplies
// e4m3 by e4m3, each activation in two parts that lose nothing (grouped_ffn_split.cuh).
enum class FfnFormat : uint8_t { kBF16, kFP8 };

// Weights of the experts of one (layer, shard) on the device, packed for the kernels: gate and up, then down,
// in tiles of 128 rows x 128 bytes in the order the kernels read them. Missing rows and columns are zero.
// Thread-compatible. What has been loaded in stream order may be used in that order.
class GroupedFfnWeights {
 public:
  // Device memory that Create takes. REQUIRES: a shape that Create accepts.
  static int64_t Bytes(const GroupedFfnShape& shape, FfnFormat format);
  // Allocates; every expert's weights are undefined until loaded.
  static absl::StatusOr<GroupedFfnWeights> Create(const GroupedFfnShape& shape, FfnFormat format);

  // One expert. gate, up: row-major [inner, hidden]; down: [hidden, inner]. OUT_OF_RANGE if there is no such
  // expert. Load: all three on the device, 16-byte aligned.
  absl::Status Load(int32_t expert, const bf16* gate, const bf16* up, const bf16* down, const Stream& stream);
  // Upload: from the host through `staging`, which grows to one expert's row-major bytes and may serve many
  // calls on one stream. Ordinary host memory may be reused on return, pinned memory after the stream is
  // synchronised.
  absl::Status Upload(int32_t expert, const bf16* gate, const bf16* up, const bf16* down,
                      DeviceBuffer& staging, const Stream& stream);

  // The packed form, gate and up before down, for another GPU's weights of the same shape and format: bytes
  // [begin, begin + out.size()) of it to the host, and from there. In stream order; OUT_OF_RANGE beyond
  // bytes().
  absl::Status ReadPacked(int64_t begin, std::span<std::byte> out, const Stream& stream) const;
  absl::Status WritePacked(int64_t begin, std::span<const std::byte> bytes, const Stream& stream);

  const GroupedFfnShape& shape() const { return shape_; }
  FfnFormat format() const { return format_; }
  int64_t bytes() const { return gate_up_.bytes() + down_.bytes(); }
  const uint8_t* gate_up() const { return gate_up_.as<uint8_t>(); }
  const uint8_t* down() const { return down_.as<uint8_t>(); }

 private:
  GroupedFfnWeights() = default;

  GroupedFfnShape shape_;
  FfnFormat format_ = FfnFormat::kBF16;
  DeviceBuffer gate_up_;
  DeviceBuffer down_;
};

// All pointers are device pointers, activations 16-byte aligned.
struct GroupedFfnArgs {
  const GroupedFfnWeights* weights = nullptr;
  const bf16* x = nullptr;  // [x_rows, hidden]
  int32_t outputs = 0;      // capacity: 0..outputs_max
  const int32_t* outputs_used =
      nullptr;  // [1], 0..outputs: outputs from there on are neither read nor written; may be null
  const int32_t* source = nullptr;      // [outputs], 0..x_rows - 1; null: output i has row i
  const int32_t* experts = nullptr;     // [outputs, slots]; anything but 0..experts - 1 is no pair (write -1)
  const float* slot_weights = nullptr;  // [outputs, slots]
  // Either the sum itself, in bf16, zero where an output has no pair ...
  bf16* partial = nullptr;  // [outputs, hidden]
  uint8_t* finite =
      nullptr;  // [outputs], of `partial`: 1 if every value of the row is finite, else 0; may be null
  // Row of `partial` of each output; null: output i has row i. Distinct.
  const int32_t* partial_rows = nullptr;  // [outputs]
  // ... or the sum added to what is there, one rounding per value.
  float* x_residual = nullptr;  // [outputs, hidden]
};

// Thread-compatible; one user and one stream at a time, because the workspace is shared. One object serves
// all layers of a shape.
class GroupedFfn {
 public:
  struct Options {
    GroupedFfnShape shape;
    FfnFormat format = FfnFormat::kBF16;  // of the weights
    int32_t slots = 0;                    // 1..32
    // The workspace holds outputs_max * slots pairs of 2 (hidden + inner) bytes; for kFP8 on Hopper also
    // outputs_max rows of 2 hidden bytes.
    int32_t outputs_max = 0;
    Path path = Path::kAuto;
    int32_t variant =
        0;  // for measurements: units a block takes of a lone tile of pairs, 1 or 2; 0 is the one to use
  };
  static absl::StatusOr<GroupedFfn> Create(const Options& options);

  // INVALID_ARGUMENT if shapes, pointers or the capacity do not fit.
  absl::Status Run(const GroupedFfnArgs& args, const Stream& stream);

  int64_t workspace_bytes() const {
    return tables_.bytes() + inner_.bytes() + pairs_.bytes() + parts_.bytes() + part_scales_.bytes();
  }

 private:
  GroupedFfn() = default;
  // Whether activations meet the weights in two e4m3 parts each (grouped_ffn_kernels.h).
  bool splits() const { return options_.format == FfnFormat::kFP8 && path_ == Path::kHopper; }

  Options options_;
  DeviceInfo device_;
  Path path_ = Path::kPortable;
  DeviceBuffer tables_;  // GroupedFfnTables
  DeviceBuffer inner_;   // [pairs, inner rounded up to blocks] bf16, or two parts of e4m3; pairs by expert
  DeviceBuffer pairs_;   // [pairs, hidden] bf16, pairs by expert
  DeviceBuffer parts_;   // [outputs_max, 2, hidden rounded up to blocks] e4m3
  DeviceBuffer part_scales_;  // [outputs_max] f32
};

}  // namespace minke::cuda
