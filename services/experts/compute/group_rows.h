// A launch's unit of work: one row of one message through the experts of one group.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "libs/model/config.h"
#include "libs/wire/messages.h"
#include "services/experts/shard/unit.h"

namespace minke::experts {

// A message of a launch.
struct LaunchJob {
  wire::WorkView view;
  bool in_row_memory = false;  // view.data is in the backend's row memory, else in the host's
};

// Where a sum goes, [hidden]: into the message that carries it.
struct SumTarget {
  std::byte* at = nullptr;
  bool in_row_memory = false;  // as above
};

// One (row, group) of one message. The pairs [pair_begin, pair_end) of its WorkView belong to the group.
struct GroupRow {
  uint32_t job = 0;  // index into the launch's jobs
  uint32_t row = 0;  // index into the view's rows
  uint16_t group = 0;
  uint32_t pair_begin = 0, pair_end = 0;
};

// Splits a message's rows by group, in the order of its rows: hosted ones to `hosted`, the others to
// `missing`. A row's groups follow one another.
void SplitByGroup(const ModelConfig& config, const Units& units, uint32_t layer, uint32_t job,
                  const wire::WorkView& view, std::vector<GroupRow>& hosted, std::vector<GroupRow>& missing);

}  // namespace minke::experts
