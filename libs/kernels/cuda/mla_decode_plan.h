// How a batch of decoding sequences is shared out among the GPU's workers: host arithmetic, no GPU needed.
//
// The rows of one sequence (query tokens x heads, consecutive in memory) are cut into items of at most
// `item_rows`; an item must see every page of its sequence. Items are laid end to end, measured in pages plus
// a fixed cost per segment, and the line is cut into equal parts, one per worker. An item that is cut becomes
// several segments, whose partial results a second kernel combines; an item in one piece writes its result
// directly. Where whole items are balanced nearly as well, none is cut.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace minke::cuda {

struct DecodeSequence {
  int32_t length = 0;   // cached tokens, this step's queries included
  int32_t queries = 1;  // the last `queries` tokens attend, causally: 1..4
};

// Read by the kernels: 48 bytes.
struct DecodeSegment {
  int32_t row;          // of q and out: token * heads + head
  int32_t rows;         // of the item
  int32_t row_offset;   // of the item within its sequence
  int32_t first_limit;  // tokens the sequence's first query sees
  int32_t length;
  int32_t sequence;  // row of the page table
  int32_t page_begin;
  int32_t pages;
  int32_t split;  // partial result to write; -1: the only segment of its item
  int32_t unused[3];
};
static_assert(sizeof(DecodeSegment) == 48);

struct DecodeCombine {
  int32_t row;
  int32_t rows;
  int32_t split_begin;
  int32_t splits;
};

struct MlaDecodePlan {
  int64_t tokens = 0;                   // queries of all sequences
  std::vector<DecodeSegment> segments;  // by worker
  std::vector<int32_t> worker_begin;    // [workers + 1] into segments
  std::vector<DecodeCombine> combines;
  int32_t splits = 0;      // partial results in use: at most 2 x workers
  int32_t splits_max = 0;  // of one item
  int64_t payload = 0;     // cost of the busiest worker, in pages
};

struct MlaDecodePlanLimits {
  int32_t heads = 0;
  int32_t item_rows = 64;
  int32_t workers = 1;
  // Loading queries, starting the pipeline and writing a result cost about as much as this many pages.
  int32_t segment_cost = 3;
  // And so do writing partial results and combining them, once, if any item is cut; pages of cut items also
  // take a little longer, by about a 32nd. Negative: they are cut unless whole ones balance better by that
  // much.
  int32_t combine_cost = 6;
};

// INVALID_ARGUMENT if a sequence has no query, more than 4, or fewer tokens than queries.
absl::StatusOr<MlaDecodePlan> PlanMlaDecode(std::span<const DecodeSequence> sequences,
                                            const MlaDecodePlanLimits& limits);

}  // namespace minke::cuda
