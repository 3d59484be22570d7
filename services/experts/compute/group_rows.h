// A launch's unit of work: one row of one message through the experts of one group.
#pragma once

#include <cstdint>
#include <vector>

#include "libs/model/config.h"
#include "libs/wire/messages.h"
#include "services/experts/shard/unit.h"

namespace minke::experts {

// One (row, group) of one message. The pairs [pair_begin, pair_end) of its WorkView belong to the group.
struct GroupRow {
  uint32_t job = 0;  // index into the launch's views
  uint32_t row = 0;  // index into the view's rows
  uint16_t group = 0;
  uint32_t pair_begin = 0, pair_end = 0;
};

// Splits a message's rows by group, in the order of its rows: hosted ones to `hosted`, the others to
// `missing`. A row's groups follow one another.
void SplitByGroup(const ModelConfig& config, const Units& units, uint32_t layer, uint32_t job,
                  const wire::WorkView& view, std::vector<GroupRow>& hosted, std::vector<GroupRow>& missing);

}  // namespace minke::experts
