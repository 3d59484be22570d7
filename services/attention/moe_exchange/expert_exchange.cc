#include "services/attention/moe_exchange/expert_exchange.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/kernels/cpu/matmul.h"
#include "services/attention/layers/or_exit.h"

namespace minke::attention {

using transport::FrameRef;

namespace {

constexpr int kDoublingsMax = 4;         // of a deadline: 16 times the first
constexpr size_t kEarlyFramesMax = 256;  // partials that overtook their plan, per piece
// The percentile is followed by small steps: up by this share when results take longer, down by a 99th of it
// when they do not, so that one in a hundred is longer.
constexpr double kPercentileStep = 0.1;
constexpr absl::Duration kPercentileFirst = absl::Milliseconds(100);

void Observe(ExchangeLatencies::ByServer& latencies, NodeId server, absl::Duration time) {
  const auto make = [] { return std::make_unique<telemetry::Histogram>(telemetry::StepSecondsBuckets()); };
  latencies.Get(server, make).Observe(absl::ToDoubleSeconds(time));
}

}  // namespace

// One (row, group) to be done.
struct ExpertExchange::Slot {
  enum class State : uint8_t { kUnsent, kSent, kDone };
  uint16_t group = 0;
  State state = State::kUnsent;
  NodeId server;
  PartialSum partial;  // inside a held frame
};

// The rows of one Dispatch message.
struct ExpertExchange::Piece {
  FrameRef frame;  // keeps the rows until the exchange ends
  const std::byte* data() const {
    return frame.device_rows() != nullptr ? frame.device_rows() : frame.payload();
  }
  uint32_t row_begin = 0, rows = 0;
  uint32_t attempt = 0;     // raised when the piece is to be gated anew
  bool dispatched = false;  // a router has it
  bool planned = false;
  bool unsent = false;  // some slot is kUnsent
  bool hedged = false;
  NodeId router;
  absl::Time sent_at, deadline, retry_at;
  absl::Time planned_at, hedge_at;
  int doublings = 0;
  int64_t open = 0;  // slots not kDone
  std::vector<FrameRef> early;
  std::vector<uint16_t> experts;     // [rows, k]
  std::vector<float> weights;        // [rows, k]
  std::vector<Slot> slots;           // [rows, fan_out_max]
  std::vector<uint8_t> slot_count;   // [rows]
  std::vector<RowOutcome> outcomes;  // [rows]
};

struct ExpertExchange::Exchange {
  bool active = false;
  int microbatch = 0;
  uint64_t step = 0;
  int32_t layer = 0;
  wire::TrafficClass traffic_class{};
  int64_t rows = 0;
  bool on_device = false;  // begun there, and combined there
  uint32_t rows_per_piece = 1;
  size_t piece_count = 0;
  std::vector<Piece> pieces;   // the first piece_count are in use; the rest keep their memory
  std::vector<FrameRef> held;  // partials
  absl::Time give_up_at;
  std::vector<ExchangeLeg>* legs = nullptr;  // of a traced one
  std::span<Piece> active_pieces() { return {pieces.data(), piece_count}; }
};

ExpertExchange::ExpertExchange(const ModelConfig& config, Precision precision,
                               transport::Transport& transport, ExchangeOptions options, int microbatches_max,
                               router::Gate* local_gate, ThreadPool& pool)
    : config_(config),
      precision_(precision),
      shape_(RowShapeOf(config, precision)),
      options_(options),
      transport_(transport),
      local_gate_(local_gate),
      pool_(pool),
      sender_(config, precision, transport),
      placement_(std::make_shared<router::PlacementTable>()) {
  for (int i = 0; i < microbatches_max; ++i) {
    exchanges_.push_back(std::make_unique<Exchange>());
    exchanges_.back()->microbatch = i;
  }
  for (absl::Duration& slow : slow_) slow = kPercentileFirst;
  if (local_gate != nullptr) route_counters_ = std::make_unique<router::RouteCounters>(config);
}

ExpertExchange::~ExpertExchange() = default;

void ExpertExchange::SetPlacement(std::shared_ptr<const router::PlacementTable> placement) {
  if (route_counters_ != nullptr) route_counters_->SetPlacement(placement);
  placement_ = std::move(placement);
}

void ExpertExchange::RetainNodes(absl::FunctionRef<bool(NodeId)> kept) {
  latencies_.dispatch.Retain(kept);
  latencies_.combine.Retain(kept);
  if (route_counters_ != nullptr) route_counters_->RetainServers(kept);
}

bool ExpertExchange::IsUp(NodeId peer) const { return std::find(up_.begin(), up_.end(), peer) != up_.end(); }

void ExpertExchange::OnPeerUp(NodeId peer) {
  if (!IsUp(peer)) up_.push_back(peer);
}

void ExpertExchange::OnPeerLost(NodeId peer) {
  std::erase(up_, peer);
  const absl::Time now = absl::Now();
  bool planning = false, computing = false;  // it was to do so for us
  for (const auto& exchange : exchanges_) {
    if (!exchange->active) continue;
    for (Piece& piece : exchange->active_pieces()) {
      if (!piece.planned && piece.dispatched && piece.router == peer) {
        planning = true;
        ++piece.attempt;
        ++counters_.plan_retries;
        piece.dispatched = false;
        piece.early.clear();
        piece.retry_at = now;
      }
      for (Slot& slot : piece.slots) {
        // A router that told the plan may have died before it sent the rows.
        const bool from_lost = slot.server == peer || (piece.planned && piece.router == peer);
        if (slot.state == Slot::State::kSent && from_lost) {
          (slot.server == peer ? computing : planning) = true;
          slot.state = Slot::State::kUnsent;
          piece.unsent = true;
          piece.retry_at = now;
          ++counters_.redispatched_rows;
        }
      }
    }
  }
  counters_.router_failovers += planning ? 1 : 0;
  counters_.expert_failovers += computing ? 1 : 0;
}

wire::FrameHeader ExpertExchange::ExchangeHeader(const Exchange& exchange, const Piece& piece) const {
  wire::FrameHeader header;
  header.traffic_class = exchange.traffic_class;
  header.origin = transport_.self().value;
  header.step = exchange.step;
  header.layer = static_cast<uint16_t>(exchange.layer);
  header.microbatch = static_cast<uint16_t>(exchange.microbatch);
  header.attempt = piece.attempt;
  header.set_epoch(placement_->epoch());
  return header;
}

std::byte* ExpertExchange::RowsOfMessage(int microbatch, int64_t rows) {
  Exchange& exchange = *exchanges_[microbatch];
  MK_CHECK(!exchange.active);
  if (rows > static_cast<int64_t>(MessageRowsMax(shape_))) return nullptr;
  if (exchange.pieces.empty()) exchange.pieces.resize(1);
  FrameRef& frame = exchange.pieces.front().frame;
  frame = transport_.frames().Allocate(static_cast<uint32_t>(rows * shape_.row_bytes()));
  return frame.payload();
}

ExpertExchange::Exchange& ExpertExchange::BeginPieces(int microbatch, uint64_t step, int32_t layer,
                                                      wire::TrafficClass traffic_class, int64_t rows,
                                                      absl::Time now) {
  Exchange& exchange = *exchanges_[microbatch];
  MK_CHECK(!exchange.active && rows > 0);
  exchange.active = true;
  exchange.legs = nullptr;
  exchange.step = step;
  exchange.layer = layer;
  exchange.traffic_class = traffic_class;
  exchange.rows = rows;
  exchange.rows_per_piece = static_cast<uint32_t>(MessageRowsMax(shape_));
  exchange.piece_count = (rows + exchange.rows_per_piece - 1) / exchange.rows_per_piece;
  exchange.give_up_at = now + options_.total_timeout;
  if (exchange.pieces.size() < exchange.piece_count) exchange.pieces.resize(exchange.piece_count);
  counters_.dispatched_rows += rows;
  for (size_t i = 0; i < exchange.piece_count; ++i) {
    Piece& piece = exchange.pieces[i];
    piece.row_begin = static_cast<uint32_t>(i) * exchange.rows_per_piece;
    piece.rows = static_cast<uint32_t>(std::min<int64_t>(exchange.rows_per_piece, rows - piece.row_begin));
    piece.attempt = 0;
    piece.dispatched = piece.planned = piece.unsent = false;
    piece.retry_at = now;
    piece.doublings = 0;
    piece.open = 0;
    piece.slots.clear();
  }
  return exchange;
}

void ExpertExchange::RoutePiece(Exchange& exchange, Piece& piece, absl::Time now) {
  if (local_gate_ != nullptr) {
    RouteHere(exchange, piece, now);
  } else {
    SendDispatch(exchange, piece, now);
  }
}

void ExpertExchange::Begin(int microbatch, uint64_t step, int32_t layer, wire::TrafficClass traffic_class,
                           const std::byte* x, int64_t rows, absl::Time now) {
  Exchange& exchange = BeginPieces(microbatch, step, layer, traffic_class, rows, now);
  exchange.on_device = false;
  for (Piece& piece : exchange.active_pieces()) {
    const uint32_t bytes = static_cast<uint32_t>(piece.rows * shape_.row_bytes());
    const std::byte* from = x + piece.row_begin * shape_.row_bytes();
    if (!piece.frame || piece.frame.payload() != from) {
      piece.frame = transport_.frames().Allocate(bytes);
      std::memcpy(piece.frame.payload(), from, bytes);
    }
    RoutePiece(exchange, piece, now);
  }
}

void ExpertExchange::BeginOnDevice(int microbatch, uint64_t step, int32_t layer,
                                   wire::TrafficClass traffic_class, const std::byte* x, int64_t rows,
                                   absl::Time now) {
  transport::RowMemory& memory = *transport_.row_memory();
  Exchange& exchange = BeginPieces(microbatch, step, layer, traffic_class, rows, now);
  exchange.on_device = true;
  const int64_t row_bytes = shape_.row_bytes();
  copies_.clear();
  for (Piece& piece : exchange.active_pieces()) {
    piece.frame = RowsFrame(piece.rows);
    const std::byte* from = x + piece.row_begin * row_bytes;
    if (piece.frame.device_rows() == nullptr) {
      OrExit(memory.CopyToHost(piece.frame.payload(), from, piece.rows * row_bytes));
      continue;
    }
    for (uint32_t i = 0; i < piece.rows; ++i)
      copies_.push_back({piece.frame.device_rows() + i * row_bytes, from + i * row_bytes});
  }
  OrExit(memory.CopyRows(copies_));  // of all messages at once
  for (Piece& piece : exchange.active_pieces()) RoutePiece(exchange, piece, now);
}

// A Dispatch's: rows in row memory, or, if no block is free, in host memory.
FrameRef ExpertExchange::RowsFrame(uint32_t rows) {
  const auto bytes = static_cast<uint32_t>(rows * shape_.row_bytes());
  FrameRef frame = transport_.frames().AllocateWithRows(bytes, 0, *transport_.row_memory());
  return frame ? frame : transport_.frames().Allocate(bytes);
}

// Another message of the same rows.
FrameRef ExpertExchange::SameRows(const FrameRef& frame) {
  const uint32_t bytes = frame.header().payload_bytes;
  if (frame.device_rows() == nullptr) {
    FrameRef fresh = transport_.frames().Allocate(bytes);
    std::memcpy(fresh.payload(), frame.payload(), bytes);
    return fresh;
  }
  const int64_t row_bytes = shape_.row_bytes();
  FrameRef fresh = RowsFrame(static_cast<uint32_t>(bytes / row_bytes));
  if (fresh.device_rows() == nullptr) return OrExit(transport_.frames().CopyToHost(frame));
  copies_.clear();
  for (int64_t at = 0; at < bytes; at += row_bytes)
    copies_.push_back({fresh.device_rows() + at, frame.device_rows() + at});
  OrExit(transport_.row_memory()->CopyRows(copies_));
  return fresh;
}

router::WorkItem ExpertExchange::ItemOf(const Piece& piece, uint32_t row, uint64_t groups) const {
  const int64_t k = shape_.top_k;
  return {.row = piece.row_begin + row,
          .data = piece.data() + row * shape_.row_bytes(),
          .experts = &piece.experts[row * k],
          .weights = &piece.weights[row * k],
          .groups = groups,
          .on_device = piece.frame.device_rows() != nullptr};
}

void ExpertExchange::SendDispatch(Exchange& exchange, Piece& piece, absl::Time now) {
  std::vector<NodeId>::const_iterator router = routers_.end();
  for (size_t i = 0; i < routers_.size() && router == routers_.end(); ++i) {
    // Nodes and microbatches begin with different ones.
    const size_t first = transport_.self().value % routers_.size() + exchange.microbatch + piece.attempt;
    const auto candidate = routers_.begin() + (first + i) % routers_.size();
    if (IsUp(*candidate)) router = candidate;
  }
  if (router == routers_.end()) {
    piece.retry_at = now + options_.retry_pause;
    return;
  }
  if (!transport_.TakeCredit(*router, exchange.traffic_class, piece.rows)) {
    piece.retry_at = now;  // asked again at every turn of the engine's wait
    return;
  }
  // The old frame may still be on its way out, with its old header.
  if (piece.attempt > 0) piece.frame = SameRows(piece.frame);
  wire::FrameHeader& header = piece.frame.header();
  const uint32_t payload_bytes = header.payload_bytes;
  header = ExchangeHeader(exchange, piece);
  header.kind = wire::Kind::kDispatch;
  header.rows = piece.rows;
  header.row_begin = piece.row_begin;
  header.payload_bytes = payload_bytes;
  piece.dispatched = true;
  piece.sent_at = now;
  piece.router = *router;
  piece.deadline = now + options_.plan_timeout * (1 << piece.doublings);
  if (absl::Status sent = transport_.Send(*router, piece.frame); !sent.ok()) {
    piece.dispatched = false;
    ++piece.attempt;
    piece.retry_at = now + options_.retry_pause;
  }
}

void ExpertExchange::RouteHere(Exchange& exchange, Piece& piece, absl::Time now) {
  const int64_t k = shape_.top_k;
  piece.experts.resize(piece.rows * k);
  piece.weights.resize(piece.rows * k);
  gate_results_.resize(piece.rows);
  const std::byte* const there = piece.frame.device_rows();
  if (there != nullptr && local_gate_->takes_device_rows()) {
    local_gate_->RouteDeviceRows(exchange.layer, piece.row_begin, there, piece.rows, piece.experts.data(),
                                 piece.weights.data(), gate_results_.data(), pool_);
  } else {
    const std::byte* rows = piece.frame.payload();
    if (there != nullptr) {
      gate_rows_.resize(piece.rows * shape_.row_bytes());
      OrExit(transport_.row_memory()->CopyToHost(gate_rows_.data(), there, gate_rows_.size()));
      rows = gate_rows_.data();
    }
    local_gate_->Route(exchange.layer, piece.row_begin, rows, piece.rows, piece.experts.data(),
                       piece.weights.data(), gate_results_.data(), pool_);
  }
  for (uint32_t i = 0; i < piece.rows; ++i) {
    if (gate_results_[i] == router::GateResult::kRejected) piece.weights[i * k] = wire::kRejectedRowWeight;
  }
  piece.sent_at = now;
  AdoptPlan(piece, exchange.traffic_class, now);
  SendAgain(exchange, piece, now);
  CountRoutes(exchange, piece);
}

void ExpertExchange::CountRoutes(const Exchange& exchange, const Piece& piece) {
  const int64_t fan_out = config_.fan_out_max(), groups = shape_.num_groups;
  routed_to_.assign(piece.rows * groups, NodeId{});
  for (uint32_t i = 0; i < piece.rows; ++i) {
    for (int64_t s = 0; s < piece.slot_count[i]; ++s) {
      const Slot& slot = piece.slots[i * fan_out + s];
      routed_to_[i * groups + slot.group] = slot.server;
    }
  }
  route_counters_->Count(exchange.layer, piece.rows, piece.experts.data(), gate_results_.data(),
                         local_gate_->scores(), routed_to_);
}

// Makes a slot of every (row, group) of piece.experts, unsent.
void ExpertExchange::AdoptPlan(Piece& piece, wire::TrafficClass traffic_class, absl::Time now) {
  const int64_t k = shape_.top_k, fan_out = config_.fan_out_max();
  piece.slots.assign(piece.rows * fan_out, Slot{});
  piece.slot_count.assign(piece.rows, 0);
  piece.outcomes.assign(piece.rows, RowOutcome::kOk);
  piece.planned = true;
  piece.unsent = true;
  piece.open = 0;
  piece.doublings = 0;
  piece.deadline = now + options_.result_timeout;
  piece.retry_at = now;
  piece.planned_at = now;
  piece.hedged = false;
  piece.hedge_at = absl::InfiniteFuture();
  if (options_.hedge_factor > 0) {
    const absl::Duration slow = slow_[static_cast<int>(traffic_class)];
    piece.hedge_at = now + std::max(options_.hedge_min, slow * options_.hedge_factor);
  }
  for (uint32_t i = 0; i < piece.rows; ++i) {
    if (piece.weights[i * k] == wire::kRejectedRowWeight) {
      piece.outcomes[i] = RowOutcome::kRejected;
      continue;
    }
    uint64_t mask = router::GroupMask(config_, {piece.experts.data() + i * k, static_cast<size_t>(k)});
    MK_CHECK(std::popcount(mask) <= fan_out);
    for (; mask != 0; mask &= mask - 1) {
      piece.slots[i * fan_out + piece.slot_count[i]++].group = static_cast<uint16_t>(std::countr_zero(mask));
      ++piece.open;
    }
  }
}

void ExpertExchange::ResultsTook(Exchange& exchange, absl::Duration time) {
  absl::Duration& slow = slow_[static_cast<int>(exchange.traffic_class)];
  slow *= time > slow ? 1 + kPercentileStep : 1 - kPercentileStep / 99;
}

// Asks other replicas for what the slow ones have not answered. The slots stay with their first servers:
// should those be lost, or the second ones, everything goes on as without the hedge.
void ExpertExchange::Hedge(Exchange& exchange, Piece& piece) {
  const int64_t fan_out = config_.fan_out_max();
  piece.hedged = true;
  std::vector<NodeId> slow;
  std::vector<router::WorkItem> items;
  for (uint32_t i = 0; i < piece.rows; ++i) {
    uint64_t groups = 0;
    for (int64_t s = 0; s < piece.slot_count[i]; ++s) {
      const Slot& slot = piece.slots[i * fan_out + s];
      if (slot.state != Slot::State::kSent) continue;
      groups |= uint64_t{1} << slot.group;
      if (std::find(slow.begin(), slow.end(), slot.server) == slow.end()) slow.push_back(slot.server);
    }
    if (groups == 0) continue;
    items.push_back(ItemOf(piece, i, groups));
  }
  if (items.empty()) return;
  sender_.Send(
      *placement_, ExchangeHeader(exchange, piece), items,
      [&](NodeId server) {
        return IsUp(server) && std::find(slow.begin(), slow.end(), server) == slow.end();
      },
      [&](size_t, uint32_t, NodeId server) { counters_.hedged_rows += server != NodeId{}; });
}

void ExpertExchange::SendAgain(Exchange& exchange, Piece& piece, absl::Time now) {
  const int64_t fan_out = config_.fan_out_max();
  static thread_local std::vector<router::WorkItem> items;
  items.clear();
  for (uint32_t i = 0; i < piece.rows; ++i) {
    uint64_t groups = 0;
    for (int64_t s = 0; s < piece.slot_count[i]; ++s) {
      const Slot& slot = piece.slots[i * fan_out + s];
      if (slot.state == Slot::State::kUnsent) groups |= uint64_t{1} << slot.group;
    }
    if (groups == 0) continue;
    items.push_back(ItemOf(piece, i, groups));
  }
  piece.unsent = false;
  if (items.empty()) return;
  piece.retry_at = now + options_.retry_pause;
  sender_.Send(
      *placement_, ExchangeHeader(exchange, piece), items, [&](NodeId server) { return IsUp(server); },
      [&](size_t item, uint32_t group, NodeId server) {
        const uint32_t i = items[item].row - piece.row_begin;
        for (int64_t s = 0; s < piece.slot_count[i]; ++s) {
          Slot& slot = piece.slots[i * fan_out + s];
          if (slot.group != group || slot.state != Slot::State::kUnsent) continue;
          if (server == NodeId{}) {
            piece.unsent = true;
          } else {
            slot.state = Slot::State::kSent;
            slot.server = server;
          }
        }
      });
}

ExpertExchange::Exchange* ExpertExchange::Find(const wire::FrameHeader& header) {
  if (header.origin != transport_.self().value || header.microbatch >= exchanges_.size()) return nullptr;
  Exchange& exchange = *exchanges_[header.microbatch];
  const bool current = exchange.active && exchange.step == header.step && exchange.layer == header.layer;
  return current ? &exchange : nullptr;
}

ExpertExchange::Piece* ExpertExchange::FindPiece(Exchange& exchange, uint32_t row) {
  return row < exchange.rows ? &exchange.pieces[row / exchange.rows_per_piece] : nullptr;
}

void ExpertExchange::OnFrame(const FrameRef& frame) {
  const wire::FrameHeader& header = frame.header();
  Exchange* exchange = Find(header);
  if (exchange == nullptr) {
    ++counters_.stale_frames;
    return;
  }
  switch (header.kind) {
    case wire::Kind::kRoutePlan:
      return OnRoutePlan(*exchange, frame);
    case wire::Kind::kPartial:
      if (frame.device_rows() != nullptr && !exchange->on_device)
        return OnPartial(*exchange, OrExit(transport_.frames().CopyToHost(frame)), /*again=*/false);
      return OnPartial(*exchange, frame, /*again=*/false);
    case wire::Kind::kNack:
      return OnNack(*exchange, frame);
    case wire::Kind::kReject:
      return OnReject(*exchange, frame);
    case wire::Kind::kBusy:
      return OnBusy(*exchange, frame);
    default:
      ++counters_.bad_frames;
      return;
  }
}

void ExpertExchange::OnRoutePlan(Exchange& exchange, const FrameRef& frame) {
  const wire::FrameHeader& header = frame.header();
  absl::StatusOr<wire::RoutePlanView> plan = wire::ReadRoutePlan(shape_, header, frame.payload_span());
  Piece* piece = FindPiece(exchange, header.row_begin);
  if (!plan.ok() || piece == nullptr || piece->row_begin != header.row_begin || piece->rows != header.rows) {
    ++counters_.bad_frames;
    return;
  }
  if (piece->attempt != header.attempt || piece->planned) {
    ++counters_.stale_frames;
    return;
  }
  const absl::Time now = absl::Now();
  const int64_t k = shape_.top_k, fan_out = config_.fan_out_max();
  // The fan-out bound is what result slots are reserved by: a plan that breaks it is not a plan.
  for (uint32_t i = 0; i < piece->rows; ++i) {
    if (std::popcount(router::GroupMask(config_, plan->experts.subspan(i * k, k))) > fan_out) {
      ++counters_.bad_frames;
      return;
    }
  }
  Observe(latencies_.dispatch, piece->router, now - piece->sent_at);
  if (exchange.legs != nullptr)
    exchange.legs->push_back({true, piece->router, piece->sent_at, now, piece->rows});
  piece->experts.assign(plan->experts.begin(), plan->experts.end());
  piece->weights.assign(plan->weights.begin(), plan->weights.end());
  AdoptPlan(*piece, exchange.traffic_class, now);
  piece->unsent = false;
  for (uint32_t i = 0; i < piece->rows; ++i) {
    for (int64_t s = 0; s < piece->slot_count[i]; ++s) {
      Slot& slot = piece->slots[i * fan_out + s];
      for (int64_t e = 0; e < k; ++e) {
        const uint16_t index = plan->server_index[i * k + e];
        if (config_.GroupOfExpert(plan->experts[i * k + e]) != slot.group || index == wire::kNoServer)
          continue;
        slot.server = NodeId{plan->servers[index]};
        // A server this node is not connected to could not answer it.
        if (IsUp(slot.server)) slot.state = Slot::State::kSent;
      }
      if (slot.state == Slot::State::kUnsent) piece->unsent = true;
    }
  }
  overtook_.swap(piece->early);  // neither gives up its memory
  for (const FrameRef& partial : overtook_) OnPartial(exchange, partial, /*again=*/true);
  overtook_.clear();
}

void ExpertExchange::OnPartial(Exchange& exchange, const FrameRef& frame, bool again) {
  const wire::FrameHeader& header = frame.header();
  absl::StatusOr<wire::PartialView> view = wire::ReadPartial(shape_, header, frame.payload_span());
  const bool in_row_memory = frame.device_rows() != nullptr;
  if (!view.ok()) {
    ++counters_.bad_frames;
    return;
  }
  if (in_row_memory) view->data = frame.device_rows();
  const int64_t fan_out = config_.fan_out_max();
  bool used = false;
  const absl::Time now = absl::Now();
  for (size_t r = 0; r < view->rows.size(); ++r) {
    const wire::PartialRow& partial = view->rows[r];
    Piece* piece = FindPiece(exchange, partial.row);
    // What comes before a row that ends the message is used, and the frame held for it.
    if (piece == nullptr) {
      ++counters_.bad_frames;
      break;
    }
    if (piece->attempt != header.attempt) {
      ++counters_.stale_frames;
      break;
    }
    if (!piece->planned) {
      if (!again && piece->early.size() < kEarlyFramesMax) piece->early.push_back(frame);
      break;
    }
    const uint32_t i = partial.row - piece->row_begin;
    Slot* found = nullptr;
    for (int64_t s = 0; s < piece->slot_count[i]; ++s) {
      if (piece->slots[i * fan_out + s].group == partial.group) found = &piece->slots[i * fan_out + s];
    }
    if (found == nullptr) {
      ++counters_.bad_frames;
    } else if (found->state == Slot::State::kDone) {
      ++counters_.duplicate_rows;
    } else {
      found->state = Slot::State::kDone;
      found->partial = {view->data + r * shape_.row_bytes(), !in_row_memory};
      if (--piece->open == 0) ResultsTook(exchange, now - piece->planned_at);
      if (!std::exchange(used, true)) {
        Observe(latencies_.combine, found->server, now - piece->sent_at);
        if (exchange.legs != nullptr) {
          const auto rows = static_cast<uint32_t>(view->rows.size());
          exchange.legs->push_back({false, found->server, piece->sent_at, now, rows});
        }
      }
    }
  }
  if (used) exchange.held.push_back(frame);
}

void ExpertExchange::OnNack(Exchange& exchange, const FrameRef& frame) {
  absl::StatusOr<wire::PartialView> view = wire::ReadRowList(shape_, frame.header(), frame.payload_span());
  if (!view.ok()) {
    ++counters_.bad_frames;
    return;
  }
  const absl::Time now = absl::Now();
  const int64_t fan_out = config_.fan_out_max();
  for (const wire::PartialRow& row : view->rows) {
    Piece* piece = FindPiece(exchange, row.row);
    if (piece == nullptr || piece->attempt != frame.header().attempt || !piece->planned) continue;
    for (int64_t s = 0; s < piece->slot_count[row.row - piece->row_begin]; ++s) {
      Slot& slot = piece->slots[(row.row - piece->row_begin) * fan_out + s];
      if (slot.group != row.group || slot.state != Slot::State::kSent) continue;
      slot.state = Slot::State::kUnsent;
      piece->unsent = true;
      // The server knows a newer table; ours is on its way.
      piece->retry_at = frame.header().epoch() > placement_->epoch() ? now + options_.retry_pause : now;
      ++counters_.redispatched_rows;
    }
  }
}

void ExpertExchange::OnReject(Exchange& exchange, const FrameRef& frame) {
  absl::StatusOr<wire::PartialView> view = wire::ReadRowList(shape_, frame.header(), frame.payload_span());
  if (!view.ok()) {
    ++counters_.bad_frames;
    return;
  }
  for (const wire::PartialRow& row : view->rows) {
    Piece* piece = FindPiece(exchange, row.row);
    if (piece == nullptr || piece->attempt != frame.header().attempt) continue;
    if (piece->planned) FailRow(*piece, row.row, RowOutcome::kRejected);
  }
}

void ExpertExchange::OnBusy(Exchange& exchange, const FrameRef& frame) {
  absl::StatusOr<wire::PartialView> view = wire::ReadRowList(shape_, frame.header(), frame.payload_span());
  Piece* piece = view.ok() && !view->rows.empty() ? FindPiece(exchange, view->rows.front().row) : nullptr;
  if (piece == nullptr) {
    ++counters_.bad_frames;
    return;
  }
  if (piece->attempt != frame.header().attempt || piece->planned) return;
  ++piece->attempt;
  ++counters_.plan_retries;
  piece->dispatched = false;
  piece->early.clear();
  piece->retry_at = absl::Now() + options_.retry_pause;
}

void ExpertExchange::FailRow(Piece& piece, uint32_t row, RowOutcome outcome) {
  const int64_t i = row - piece.row_begin, fan_out = config_.fan_out_max();
  if (piece.outcomes[i] == RowOutcome::kOk) piece.outcomes[i] = outcome;
  for (int64_t s = 0; s < piece.slot_count[i]; ++s) {
    Slot& slot = piece.slots[i * fan_out + s];
    if (slot.state != Slot::State::kDone) --piece.open;
    slot.state = Slot::State::kDone;
  }
}

void ExpertExchange::Tick(absl::Time now) {
  for (const auto& exchange : exchanges_) {
    if (!exchange->active) continue;
    for (Piece& piece : exchange->active_pieces()) {
      if (piece.planned && piece.open == 0) continue;
      if (now >= exchange->give_up_at) {
        if (!piece.planned) {  // no plan: every row fails, with no slot to wait for
          piece.outcomes.assign(piece.rows, RowOutcome::kUnavailable);
          piece.slot_count.assign(piece.rows, 0);
          piece.slots.assign(piece.rows * config_.fan_out_max(), Slot{});
          piece.planned = true;
        }
        for (uint32_t i = 0; i < piece.rows; ++i) {
          const int64_t fan_out = config_.fan_out_max();
          const bool open = std::any_of(piece.slots.begin() + i * fan_out,
                                        piece.slots.begin() + i * fan_out + piece.slot_count[i],
                                        [](const Slot& slot) { return slot.state != Slot::State::kDone; });
          if (open) FailRow(piece, piece.row_begin + i, RowOutcome::kUnavailable);
        }
        continue;
      }
      if (!piece.planned) {
        if (piece.dispatched && now >= piece.deadline) {
          ++piece.attempt;
          ++counters_.plan_retries;
          piece.doublings = std::min(piece.doublings + 1, kDoublingsMax);
          piece.dispatched = false;
          piece.early.clear();
          piece.retry_at = now;
        }
        if (!piece.dispatched && now >= piece.retry_at) SendDispatch(*exchange, piece, now);
        continue;
      }
      if (now >= piece.deadline) {
        piece.doublings = std::min(piece.doublings + 1, kDoublingsMax);
        piece.deadline = now + options_.result_timeout * (1 << piece.doublings);
        for (Slot& slot : piece.slots) {
          if (slot.state != Slot::State::kSent) continue;
          slot.state = Slot::State::kUnsent;
          piece.unsent = true;
          ++counters_.redispatched_rows;
        }
        piece.retry_at = now;
      }
      if (!piece.hedged && now >= piece.hedge_at) Hedge(*exchange, piece);
      if (piece.unsent && now >= piece.retry_at) SendAgain(*exchange, piece, now);
    }
  }
}

void ExpertExchange::Trace(int microbatch, std::vector<ExchangeLeg>* legs) {
  exchanges_[microbatch]->legs = legs;
}

bool ExpertExchange::Done(int microbatch) const {
  Exchange& exchange = *exchanges_[microbatch];
  if (!exchange.active) return false;
  const auto pieces = exchange.active_pieces();
  return std::all_of(pieces.begin(), pieces.end(),
                     [](const Piece& piece) { return piece.planned && piece.open == 0; });
}

void ExpertExchange::Combine(int microbatch, float* x, std::span<RowOutcome> outcomes) {
  Exchange& exchange = *exchanges_[microbatch];
  MK_CHECK(Done(microbatch));
  const int64_t hidden = shape_.hidden, fan_out = config_.fan_out_max();
  constexpr int64_t kGrain = 8;
  pool_.ParallelFor((exchange.rows + kGrain - 1) / kGrain, [&](int64_t task) {
    static thread_local std::vector<float> sum, widened;
    sum.resize(hidden);
    widened.resize(hidden);
    for (int64_t row = task * kGrain; row < std::min(exchange.rows, (task + 1) * kGrain); ++row) {
      const Piece& piece = exchange.pieces[row / exchange.rows_per_piece];
      const int64_t i = row - piece.row_begin;
      outcomes[row] = piece.outcomes[i];
      if (piece.outcomes[i] != RowOutcome::kOk) continue;
      // Slots are in group order (they were made from a bit mask), whatever order the answers came in.
      for (int64_t s = 0; s < piece.slot_count[i]; ++s) {
        const std::byte* data = piece.slots[i * fan_out + s].partial.row;
        float* into = s == 0 ? sum.data() : widened.data();
        kernels::FromActivation(precision_, data, into, hidden);
        if (s > 0) kernels::Tiles().add_scaled(sum.data(), widened.data(), 1.0f, hidden);
      }
      kernels::Tiles().add_scaled(x + row * hidden, sum.data(), 1.0f, hidden);
    }
  });
  End(exchange);
}

void ExpertExchange::CombineOnDevice(int microbatch, RowCombiner& combiner, float* sums,
                                     std::span<RowOutcome> outcomes) {
  Exchange& exchange = *exchanges_[microbatch];
  MK_CHECK(Done(microbatch) && exchange.on_device);
  const int64_t fan_out = config_.fan_out_max();
  partials_.clear();
  partials_begin_.assign(1, 0);
  for (int64_t row = 0; row < exchange.rows; ++row) {
    const Piece& piece = exchange.pieces[row / exchange.rows_per_piece];
    const int64_t i = row - piece.row_begin;
    outcomes[row] = piece.outcomes[i];
    if (piece.outcomes[i] == RowOutcome::kOk) {
      // Slots are in group order, as above.
      for (int64_t s = 0; s < piece.slot_count[i]; ++s)
        partials_.push_back(piece.slots[i * fan_out + s].partial);
    }
    partials_begin_.push_back(static_cast<int32_t>(partials_.size()));
  }
  OrExit(combiner.Combine(partials_begin_, partials_, sums));
  End(exchange);
}

void ExpertExchange::End(Exchange& exchange) {
  exchange.active = false;
  exchange.legs = nullptr;
  exchange.held.clear();
  for (Piece& piece : exchange.active_pieces()) {
    piece.frame = FrameRef();
    piece.early.clear();
  }
}

}  // namespace minke::attention
