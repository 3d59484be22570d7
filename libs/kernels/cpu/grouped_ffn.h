// SwiGLU feed-forward: down(silu(gate(x)) * up(x)), for one matrix triple or many experts in one call.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/kernels/cpu/packed_matrix.h"
#include "libs/model/checkpoint.h"

namespace minke::kernels {

// Weights of one expert or dense layer. gate and up are packed alternately by blocks of 64 columns, so that
// one task makes both halves of the same columns and multiplies them while they are in cache.
class FfnWeights {
 public:
  // Reads `prefix`{gate,up,down}_proj.weight of shapes [inner, hidden] and [hidden, inner] and releases the
  // mapped pages; of them, `share` of the inner dimension. REQUIRES: inner % share.of == 0.
  static absl::StatusOr<FfnWeights> Load(const Checkpoint& checkpoint, const std::string& prefix,
                                         int64_t hidden, int64_t inner, Precision precision, ThreadPool& pool,
                                         Share share = {});
  // gate, up: [inner, hidden]; down: [hidden, inner].
  static FfnWeights Pack(int64_t hidden, int64_t inner, Precision precision, ElementReader gate,
                         ElementReader up, ElementReader down, ThreadPool& pool);
  // Not packed yet: to be written through storage().
  static FfnWeights Empty(int64_t hidden, int64_t inner, Precision precision);
  // The packed form, in two parts.
  std::array<std::span<std::byte>, 2> storage() { return {gate_up_.storage(), down_.storage()}; }
  std::array<std::span<const std::byte>, 2> storage() const { return {gate_up_.storage(), down_.storage()}; }
  int64_t hidden() const { return down_.n(); }
  int64_t inner() const { return down_.k(); }
  int64_t bytes() const { return gate_up_.bytes() + down_.bytes(); }
  const PackedMatrix& gate_up() const { return gate_up_; }
  const PackedMatrix& down() const { return down_; }

 private:
  PackedMatrix gate_up_;  // blocks: gate 0, up 0, gate 1, up 1 ...
  PackedMatrix down_;
};

// Rows [begin, begin + count) of the input go through `weights`.
struct FfnRows {
  const FfnWeights* weights = nullptr;
  int64_t begin = 0;
  int64_t count = 0;
};

struct FfnScratch {
  Scratch<std::byte> inner;  // [rows, inner] Act
};

// y [rows, hidden] f32 = FFN of x [rows, hidden] Act, row stride hidden; every row in exactly one item.
// Items with no rows are fine. All weights share hidden, inner and precision. Work is split by expert, column
// block and row strip, so one hot expert does not leave cores idle.
void GroupedFfn(std::span<const FfnRows> items, const std::byte* x, float* y, FfnScratch& scratch,
                ThreadPool& pool);

}  // namespace minke::kernels
