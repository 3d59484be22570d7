#include "services/router/engine/router_engine.h"

#include <algorithm>
#include <utility>

#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"

namespace minke::router {

using transport::FrameRef;

namespace {

constexpr absl::Duration kIdleWait = absl::Milliseconds(100);
// Others see the counters this late at most while the engine is busy.
constexpr absl::Duration kStatusPeriod = absl::Milliseconds(20);
// A connection that breaks and comes back within this time moves nothing.
constexpr absl::Duration kLostAfter = absl::Seconds(1);

}  // namespace

RouterEngine::RouterEngine(std::unique_ptr<Gate> gate, Precision precision,
                           std::unique_ptr<transport::Transport> transport, ThreadPool& pool)
    : gate_(std::move(gate)),
      config_(gate_->config()),
      shape_(RowShapeOf(config_, precision)),
      moe_layers_(config_.MoeLayers()),
      transport_(std::move(transport)),
      pool_(pool),
      sender_(config_, precision, *transport_),
      peers_(*transport_),
      placement_(std::make_shared<PlacementTable>()),
      route_counters_(config_) {}

RouterEngine::~RouterEngine() = default;

void RouterEngine::UpdateCluster(std::map<NodeId, std::string> experts,
                                 std::shared_ptr<const PlacementTable> placement) {
  route_counters_.SetPlacement(placement);
  {
    const MutexLock lock(mutex_);
    new_experts_ = std::move(experts);
    new_placement_ = std::move(placement);
    updated_ = true;
    has_mail_.store(true);
  }
  transport_->Wake();
}

void RouterEngine::Stop() {
  stop_.store(true);
  transport_->Wake();
}

RouterStatus RouterEngine::status() const {
  const MutexLock lock(mutex_);
  return status_;
}

void RouterEngine::TakeMail(bool publish) {
  if (!publish && !has_mail_.load()) return;
  const MutexLock lock(mutex_);
  has_mail_.store(false);
  if (updated_) {
    updated_ = false;
    experts_ = new_experts_;
    placement_ = new_placement_;
    peers_.SetWanted(experts_);
    route_counters_.RetainServers([&](NodeId server) { return experts_.contains(server); });
    reach_changed_ = true;
  }
  if (std::exchange(reach_changed_, false))
    counters_.connected = placement_->Served([&](NodeId server) { return peers_.IsUp(server); });
  counters_.lost = peers_.LostFor(kLostAfter, absl::Now());
  status_ = counters_;
}

absl::Status RouterEngine::RouteRows(const FrameRef& frame, const std::byte* data) {
  const wire::FrameHeader& header = frame.header();
  const int64_t rows = header.rows, k = shape_.top_k;
  experts_scratch_.resize(rows * k);
  weights_scratch_.resize(rows * k);
  results_.resize(rows);
  if (frame.device_rows() != nullptr && gate_->takes_device_rows()) {
    gate_->RouteDeviceRows(header.layer, header.row_begin, frame.device_rows(), rows, experts_scratch_.data(),
                           weights_scratch_.data(), results_.data(), pool_);
    return absl::OkStatus();
  }
  if (frame.device_rows() != nullptr) {
    rows_scratch_.resize(rows * shape_.row_bytes());
    MK_RETURN_IF_ERROR(
        frame.row_memory()->CopyToHost(rows_scratch_.data(), frame.device_rows(), rows_scratch_.size()));
    data = rows_scratch_.data();
  }
  gate_->Route(header.layer, header.row_begin, data, rows, experts_scratch_.data(), weights_scratch_.data(),
               results_.data(), pool_);
  return absl::OkStatus();
}

void RouterEngine::OnDispatch(NodeId from, const FrameRef& frame) {
  const wire::FrameHeader& header = frame.header();
  absl::StatusOr<const std::byte*> data = wire::ReadDispatch(shape_, header, frame.payload_span());
  if (data.ok() && (header.layer >= config_.num_hidden_layers || !gate_->HasLayer(header.layer))) {
    data = absl::InvalidArgumentError(StrCat("layer ", header.layer, " has no gate"));
  }
  if (data.ok() && header.rows > static_cast<uint32_t>(MessageRowsMax(shape_))) {
    data = absl::InvalidArgumentError(
        StrCat("expected at most ", MessageRowsMax(shape_), " rows, found ", header.rows));
  }
  if (!data.ok()) {
    ++counters_.bad_frames;
    log::Warning("router", StrCat("bad message peer=", ToString(from), ": ", data.status().message()));
    return;
  }
  if (const absl::Status routed = RouteRows(frame, *data); !routed.ok()) {
    // As if the message had been lost: its sender asks again.
    log::Error("router", StrCat("rows on the device: ", routed.message()));
    return transport_->ReturnCredit(from, header.traffic_class, header.rows);
  }
  const int64_t rows = header.rows, k = shape_.top_k, groups = shape_.num_groups;
  const bool on_device = frame.device_rows() != nullptr;
  const std::byte* const x = on_device ? frame.device_rows() : *data;
  items_.clear();
  assigned_.assign(rows * groups, NodeId{});
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* experts = experts_scratch_.data() + i * k;
    if (results_[i] == GateResult::kRejected) {
      ++counters_.rejected_rows;
      for (int64_t e = 0; e < k; ++e) experts[e] = static_cast<uint16_t>(e), weights_scratch_[i * k + e] = 0;
      weights_scratch_[i * k] = wire::kRejectedRowWeight;
      continue;
    }
    const uint64_t groups_of_row = GroupMask(config_, {experts, static_cast<size_t>(k)});
    items_.push_back({header.row_begin + static_cast<uint32_t>(i), x + i * shape_.row_bytes(), experts,
                      weights_scratch_.data() + i * k, groups_of_row, on_device});
  }
  sender_.Send(
      *placement_, header, items_, [&](NodeId server) { return peers_.IsUp(server); },
      [&](size_t item, uint32_t group, NodeId server) {
        assigned_[(items_[item].row - header.row_begin) * groups + group] = server;
        if (server == NodeId{}) ++counters_.unplaced_rows;
      });
  route_counters_.Count(header.layer, rows, experts_scratch_.data(), results_.data(), gate_->scores(),
                        assigned_);

  std::vector<NodeId>& servers = servers_;
  servers = assigned_;
  std::sort(servers.begin(), servers.end());
  servers.erase(std::unique(servers.begin(), servers.end()), servers.end());
  std::erase(servers, NodeId{});
  FrameRef plan = transport_->frames().Allocate(
      wire::RoutePlanPayloadBytes(shape_, header.rows, static_cast<uint32_t>(servers.size())));
  const wire::RoutePlanSpans out =
      wire::LayOutRoutePlan(shape_, header.rows, static_cast<uint32_t>(servers.size()), plan.payload_span());
  for (size_t s = 0; s < servers.size(); ++s) out.servers[s] = servers[s].value;
  std::copy(weights_scratch_.begin(), weights_scratch_.end(), out.weights.begin());
  std::copy(experts_scratch_.begin(), experts_scratch_.end(), out.experts.begin());
  for (int64_t i = 0; i < rows * k; ++i) {
    const NodeId server = assigned_[i / k * groups + config_.GroupOfExpert(experts_scratch_[i])];
    const auto at = std::lower_bound(servers.begin(), servers.end(), server);
    out.server_index[i] = server == NodeId{} ? wire::kNoServer : static_cast<uint16_t>(at - servers.begin());
  }
  wire::FrameHeader& reply = plan.header();
  const uint32_t payload_bytes = reply.payload_bytes;
  reply = header;
  reply.kind = wire::Kind::kRoutePlan;
  reply.flags = 0;
  reply.pairs = static_cast<uint32_t>(servers.size());
  reply.payload_bytes = payload_bytes;
  reply.set_epoch(placement_->epoch());
  // Credit first: it travels with the plan.
  transport_->ReturnCredit(from, header.traffic_class, header.rows);
  (void)transport_->Send(from, std::move(plan));  // a sender that is gone needs no plan
  ++counters_.dispatches;
  counters_.rows += header.rows;
}

void RouterEngine::Run() {
  absl::Time published = absl::InfinitePast();
  while (!stop_.load()) {
    const absl::Time now = absl::Now();
    const bool due = now - published >= kStatusPeriod;
    if (due) published = now;
    TakeMail(due);
    const int events = transport_->Poll([&](transport::Event& event) {
      switch (event.kind) {
        case transport::Event::Kind::kFrame:
          if (event.frame.header().kind == wire::Kind::kDispatch) {
            OnDispatch(event.peer, event.frame);
          } else {
            ++counters_.bad_frames;
          }
          return;
        case transport::Event::Kind::kPeerUp:
          reach_changed_ = true;
          return peers_.OnPeerUp(event.peer);
        case transport::Event::Kind::kPeerLost:
          reach_changed_ = true;
          log::Warning("router",
                       StrCat("peer lost peer=", ToString(event.peer), ": ", event.reason.message()));
          return peers_.OnPeerLost(event.peer);
      }
    });
    reach_changed_ |= !peers_.Tick(now).empty();
    if (events > 0) continue;
    TakeMail(/*publish=*/true);
    transport_->Wait(kIdleWait);
  }
}

}  // namespace minke::router
