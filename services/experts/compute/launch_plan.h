// A launch as a GPU takes it: its distinct rows once, and per unit the tables of the grouped FFN
// (libs/kernels/cuda/grouped_ffn.h). Host code only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libs/model/config.h"
#include "libs/wire/messages.h"
#include "services/experts/compute/group_rows.h"

namespace minke::experts {

// Slots of an output: most pairs that one row can have in one group.
int32_t LaunchSlots(const ModelConfig& config);

// Byte offsets of one block of memory with everything a launch uploads. Each part begins at a multiple of
// 256.
struct UploadLayout {
  int64_t source = 0;   // int32 [outputs]: row of each output
  int64_t experts = 0;  // int32 [outputs, slots]: by the unit's first expert, -1: no pair
  int64_t weights = 0;  // f32 [outputs, slots], 0: no pair
  int64_t targets = 0;  // int32 [outputs]: row of row memory for the sum; no bytes without row memory
  int64_t rows = 0;     // bf16 [rows, hidden]
  int64_t bytes = 0;
};
UploadLayout LayOutUpload(int64_t rows, int64_t outputs, int64_t slots, int64_t hidden, bool targets);

// The same for what comes back.
struct DownloadLayout {
  int64_t partials = 0;  // bf16 [sums, hidden]
  int64_t finite = 0;    // uint8 [outputs]
  int64_t bytes = 0;
};
// `sums`: all outputs, or none, if they stay in row memory.
DownloadLayout LayOutDownload(int64_t sums, int64_t outputs, int64_t hidden);

// Thread-compatible. Memory is kept from plan to plan.
class LaunchPlan {
 public:
  explicit LaunchPlan(const ModelConfig& config) : config_(config), slots_(LaunchSlots(config)) {}

  struct Row {
    uint32_t job = 0, row = 0;  // as in GroupRow
  };
  struct UnitRun {  // outputs [begin, end) are one unit's
    uint32_t group = 0;
    int32_t begin = 0, end = 0;
  };

  // One output per group row, those of a unit together, within it in the order of `group_rows`, which must
  // outlive the plan.
  void Make(std::span<const GroupRow> group_rows);

  std::span<const Row> rows() const { return rows_; }
  std::span<const UnitRun> runs() const { return runs_; }            // groups ascend
  std::span<const uint32_t> group_row_of() const { return order_; }  // [outputs]: index into `group_rows`
  int32_t slots() const { return slots_; }

  // Fills source, experts and weights at `block`, laid out by LayOutUpload. `numbers`: what the source of row
  // i of rows() is called; empty: i.
  void WriteTables(std::span<const LaunchJob> jobs, std::span<const int32_t> numbers,
                   const UploadLayout& layout, std::byte* block) const;

 private:
  const ModelConfig config_;
  const int32_t slots_;
  std::span<const GroupRow> group_rows_;
  std::vector<Row> rows_;
  std::vector<int32_t> row_of_;  // [group rows]: index into rows_
  std::vector<UnitRun> runs_;
  std::vector<uint32_t> order_;
  std::vector<int32_t> next_;  // by group
};

}  // namespace minke::experts
