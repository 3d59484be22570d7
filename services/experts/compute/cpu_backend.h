// One grouped launch: all rows that are queued for a layer, through the experts this server hosts, reduced to
// one partial sum per (row, group). Engine thread only.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "libs/base/ids.h"
#include "libs/base/thread_pool.h"
#include "libs/kernels/cpu/matmul.h"
#include "libs/model/config.h"
#include "libs/wire/messages.h"
#include "services/experts/shard/expert_shard.h"

namespace minke::experts {

using Units = std::map<UnitId, std::shared_ptr<const UnitWeights>>;

// One (row, group) of one message. The pairs [pair_begin, pair_end) of its WorkView belong to the group.
struct GroupRow {
  uint32_t job = 0;  // index into the launch's views
  uint32_t row = 0;  // index into the view's rows
  uint16_t group = 0;
  uint32_t pair_begin = 0, pair_end = 0;
};

// Splits a message's rows by group, in the order of its rows: hosted ones to `hosted`, the others to
// `missing`.
void SplitByGroup(const ModelConfig& config, const Units& units, uint32_t layer, uint32_t job,
                  const wire::WorkView& view, std::vector<GroupRow>& hosted, std::vector<GroupRow>& missing);

class Launch {
 public:
  Launch(const ModelConfig& config, Precision precision, ThreadPool& pool)
      : config_(config), precision_(precision), pool_(pool) {}

  // For every group row: sum over its pairs, in expert order, of weight x expert(row), in f32, rounded to the
  // activation dtype at outs[i] [hidden]. finite[i] is 0 where the sum has a NaN or an infinity.
  // REQUIRES: every unit of `rows` is in `units`.
  void Run(const Units& units, uint32_t layer, std::span<const wire::WorkView> views,
           std::span<const GroupRow> rows, std::span<std::byte* const> outs, std::span<uint8_t> finite);

 private:
  struct Pair {
    uint16_t expert;
    uint32_t group_row;
    uint32_t position;  // row of the gathered input
  };
  const ModelConfig config_;
  const Precision precision_;
  ThreadPool& pool_;
  std::vector<Pair> pairs_;
  std::vector<uint32_t> pair_begin_;   // of each group row, in order_
  std::vector<uint32_t> position_of_;  // gathered row of each (group row, pair)
  std::vector<kernels::FfnRows> items_;
  kernels::Scratch<std::byte> gathered_;  // [pairs, hidden] Act
  kernels::Scratch<float> outputs_;       // [pairs, hidden]
  kernels::FfnScratch scratch_;
};

}  // namespace minke::experts
