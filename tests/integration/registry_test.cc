// What both registries promise (libs/registry/registry.h), and what only etcd's can: against a router's
// membership service in this process, and against the real etcd with two candidates that decide.
#include "libs/registry/registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <thread>

#include "absl/time/clock.h"
#include "libs/base/mutex.h"
#include "libs/etcd/client.h"
#include "libs/etcd/server_command.h"
#include "libs/etcd/testing/etcd_server.h"
#include "libs/registry/etcd_registry.h"
#include "libs/rpc/grpc_server.h"
#include "services/router/api/membership_service.h"
#include "services/router/placement/placement_table.h"
#include "services/router/registry/elected_coordinator.h"

namespace minke {
namespace {

using cluster::v1::ClusterUpdate;
using cluster::v1::ClusterView;
using cluster::v1::MemberReport;
using cluster::v1::PlacementRecord;

constexpr char kModel[] = "0123456789abcdef";
constexpr absl::Duration kLease = absl::Seconds(3);  // the default of both

ModelConfig SmallModel() {
  ModelConfig config;
  config.num_hidden_layers = 3;
  config.first_k_dense_replace = 1;
  config.n_routed_experts = 8;
  config.n_group = 4;
  config.num_experts_per_tok = 2;
  config.topk_group = 2;
  return config;
}

int Units() { return static_cast<int>(router::AllUnits(SmallModel()).size()); }

MemberReport Report(NodeId id, cluster::v1::Role role) {
  MemberReport report;
  report.mutable_member()->set_node_id(id.value);
  report.mutable_member()->set_role(role);
  report.mutable_member()->set_data_address(StrCat("data-of-", ToString(id)));
  report.mutable_member()->set_ready(true);
  report.set_model_fingerprint(kModel);
  report.set_precision("exact");
  return report;
}

// A process: what it reports, and what it is told.
class Process {
 public:
  Process(const registry::RegistryAddress& address, MemberReport report)
      : report_(std::move(report)),
        registry_(registry::Join(
            address, report_,
            [this](const ClusterUpdate& update) {
              const MutexLock lock(mutex_);
              if (update.statuses_size() > 0) {
                statuses_ = update;
                ++statuses_told_;
              }
              if (!update.has_view()) return;
              last_ = update;
              ++updates_;
              for (const NodeId id : must_stay_) missed_ |= !IsMember(update.view(), id);
            },
            [this](const absl::Status& status) {
              const MutexLock lock(mutex_);
              refused_ = status;
            })) {}

  NodeId id() const { return NodeId{report_.member().node_id()}; }
  MemberReport& report() { return report_; }
  void SetReport() { registry_->SetReport(report_); }
  void Leave() { registry_.reset(); }
  bool connected() const { return registry_->connected(); }

  // Hosts what it is assigned, as an expert server does.
  void HostAssigned() {
    {
      const MutexLock lock(mutex_);
      *report_.mutable_hosted() = last_.assigned();
    }
    SetReport();
  }

  template <typename Condition>
  bool Await(const Condition& condition, absl::Duration timeout = absl::Seconds(15)) {
    const MutexLock lock(mutex_);
    return mutex_.AwaitFor(timeout, [&] { return updates_ > 0 && condition(last_); });
  }
  bool AwaitMembers(size_t count, absl::Duration timeout = absl::Seconds(15)) {
    return Await([&](const ClusterUpdate& u) { return u.view().members_size() == static_cast<int>(count); },
                 timeout);
  }
  template <typename Condition>
  bool AwaitStatuses(const Condition& condition) {
    const MutexLock lock(mutex_);
    return mutex_.AwaitFor(absl::Seconds(15), [&] { return condition(statuses_); });
  }
  int statuses_told() {
    const MutexLock lock(mutex_);
    return statuses_told_;
  }
  absl::Status AwaitRefusal() {
    const MutexLock lock(mutex_);
    mutex_.AwaitFor(absl::Seconds(15), [&] { return !refused_.ok(); });
    return refused_;
  }
  ClusterUpdate last() {
    const MutexLock lock(mutex_);
    return last_;
  }
  int updates() {
    const MutexLock lock(mutex_);
    return updates_;
  }
  // From now on every view must have these.
  void MustStay(std::vector<NodeId> ids) {
    const MutexLock lock(mutex_);
    must_stay_ = std::move(ids);
  }
  bool missed() {
    const MutexLock lock(mutex_);
    return missed_;
  }
  static bool IsMember(const ClusterView& view, NodeId id) {
    return std::any_of(view.members().begin(), view.members().end(),
                       [&](const auto& member) { return member.node_id() == id.value; });
  }

 private:
  MemberReport report_;
  Mutex mutex_;
  ClusterUpdate last_;
  int updates_ = 0;
  ClusterUpdate statuses_;  // the last one with any
  int statuses_told_ = 0;
  absl::Status refused_;
  std::vector<NodeId> must_stay_;
  bool missed_ = false;
  std::unique_ptr<registry::Registry> registry_;  // last: it calls back
};

// A router of an etcd cluster as far as membership goes.
class Candidate {
 public:
  Candidate(const std::string& etcd, router::ElectedCoordinator::DecideFunction decide)
      : id_(RandomNodeId()),
        registry_(
            {.endpoints = {etcd}, .cluster = "test"}, Report(id_, cluster::v1::ROLE_ROUTER),
            [](const ClusterUpdate&) {}, [](const absl::Status&) {}),
        coordinator_(std::in_place, registry_, id_, std::move(decide)) {}
  NodeId id() const { return id_; }
  bool leading() const { return coordinator_->leading(); }
  registry::EtcdRegistry& registry() { return registry_; }
  void StopDeciding() { coordinator_.reset(); }  // still a member, and its lease lives

 private:
  const NodeId id_;
  registry::EtcdRegistry registry_;
  std::optional<router::ElectedCoordinator> coordinator_;
};

// Every unit to one expert server by turns, published where it is hosted: enough to see a placement spread.
PlacementRecord TakeTurns(const cluster::Members& members, const PlacementRecord& current) {
  PlacementRecord next;
  std::vector<const MemberReport*> experts;
  for (const auto& [id, report] : members) {
    if (report.member().role() == cluster::v1::ROLE_EXPERT) experts.push_back(&report);
  }
  for (const MemberReport* expert : experts) next.add_assigned()->set_node_id(expert->member().node_id());
  size_t turn = 0;
  for (const UnitId unit : router::AllUnits(SmallModel())) {
    cluster::v1::UnitReplicas* replicas = next.add_placement();
    replicas->mutable_unit()->set_layer(unit.layer);
    replicas->mutable_unit()->set_group(unit.group);
    if (experts.empty()) continue;
    *next.mutable_assigned(static_cast<int>(turn++ % experts.size()))->add_units() = replicas->unit();
    for (const MemberReport* expert : experts) {
      for (const auto& hosted : expert->hosted()) {
        if (hosted.layer() == unit.layer && hosted.group() == unit.group)
          replicas->add_node_ids(expert->member().node_id());
      }
    }
  }
  *next.mutable_epoch() = current.epoch();
  if (current.epoch().counter() > 0 && next.SerializeAsString() == current.SerializeAsString()) return next;
  if (current.epoch().term() == 0) next.mutable_epoch()->set_term(1);
  next.mutable_epoch()->set_counter(current.epoch().counter() + 1);
  return next;
}

// Where a cluster's registry is, and how to hurt it. Members of its own: `routers()`.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual registry::RegistryAddress address() const = 0;
  virtual size_t routers() const = 0;
  virtual void Kill() = 0;
  virtual void StartAgain() = 0;
};

class StaticBackend final : public Backend {
 public:
  StaticBackend() { Start(); }
  ~StaticBackend() override { Kill(); }
  registry::RegistryAddress address() const override { return {.router = StrCat("127.0.0.1:", port_)}; }
  size_t routers() const override { return 1; }
  void Kill() override {
    if (service_ == nullptr) return;
    service_->Shutdown();
    server_->Shutdown(absl::ZeroDuration());
    server_.reset();
    service_.reset();
  }
  void StartAgain() override { Start(); }

 private:
  void Start() {
    service_ = std::make_unique<router::MembershipService>(
        router::MembershipOptions{
            .coordinator = {.units = router::AllUnits(SmallModel()), .expert_servers = 2}, .lease = kLease},
        Report(RandomNodeId(), cluster::v1::ROLE_ROUTER), [](const ClusterView&) {});
    server_ = *rpc::GrpcServer::Start(StrCat("127.0.0.1:", port_), {service_.get()});
    port_ = server_->port();
  }

  int port_ = 0;  // then the same one again
  std::unique_ptr<router::MembershipService> service_;
  std::unique_ptr<rpc::GrpcServer> server_;
};

class EtcdBackend final : public Backend {
 public:
  EtcdBackend() {
    for (int i = 0; i < 2; ++i)
      candidates_.push_back(std::make_unique<Candidate>(server_.address(), TakeTurns));
  }
  registry::RegistryAddress address() const override {
    return {.etcd = server_.address(), .cluster = "test"};
  }
  size_t routers() const override { return candidates_.size(); }
  void Kill() override { server_.Kill(); }
  void StartAgain() override { server_.StartAgain(/*with_data=*/true); }
  void StartAgainEmpty() { server_.StartAgain(/*with_data=*/false); }
  etcd::EtcdServer& server() { return server_; }
  std::vector<std::unique_ptr<Candidate>>& candidates() { return candidates_; }
  Candidate* Leader() {
    const absl::Time limit = absl::Now() + absl::Seconds(15);
    while (absl::Now() < limit) {
      for (const auto& candidate : candidates_) {
        if (candidate->leading()) return candidate.get();
      }
      absl::SleepFor(absl::Milliseconds(20));
    }
    return nullptr;
  }

 private:
  etcd::EtcdServer server_;
  std::vector<std::unique_ptr<Candidate>> candidates_;
};

class RegistryTest : public testing::TestWithParam<const char*> {
 protected:
  RegistryTest() {
    if (GetParam() == std::string("static")) {
      backend_ = std::make_unique<StaticBackend>();
    } else {
      backend_ = std::make_unique<EtcdBackend>();
    }
  }
  Process Join(cluster::v1::Role role) { return Process(backend_->address(), Report(RandomNodeId(), role)); }
  size_t Count(size_t processes) const { return processes + backend_->routers(); }

  std::unique_ptr<Backend> backend_;
};

INSTANTIATE_TEST_SUITE_P(Both, RegistryTest, testing::Values("static", "etcd"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(RegistryTest, AnotherModelOrPrecisionIsRefusedAndBothAreNamed) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY);
  ASSERT_TRUE(gateway.AwaitMembers(Count(1)));
  MemberReport other = Report(RandomNodeId(), cluster::v1::ROLE_EXPERT);
  other.set_model_fingerprint("ffffffffffffffff");
  Process another_model(backend_->address(), other);
  absl::Status status = another_model.AwaitRefusal();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              testing::AllOf(testing::HasSubstr("ffffffffffffffff"), testing::HasSubstr(kModel)));
  other.set_model_fingerprint(kModel);
  other.set_precision("bf16");
  Process another_precision(backend_->address(), other);
  status = another_precision.AwaitRefusal();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              testing::AllOf(testing::HasSubstr("bf16"), testing::HasSubstr("exact")));
  EXPECT_FALSE(gateway.AwaitMembers(Count(2), absl::Milliseconds(500)));
}

TEST_P(RegistryTest, EverybodySeesTheSameMembers) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION),
          expert = Join(cluster::v1::ROLE_EXPERT);
  for (Process* process : {&gateway, &attention, &expert}) {
    ASSERT_TRUE(process->AwaitMembers(Count(3)));
    for (const Process* other : {&gateway, &attention, &expert}) {
      EXPECT_TRUE(Process::IsMember(process->last().view(), other->id()));
    }
    EXPECT_TRUE(process->connected());
    EXPECT_EQ(process->last().lease_ms(), 3000u);
  }
  const auto same = [&] {
    return gateway.last().view().SerializeAsString() == attention.last().view().SerializeAsString() &&
           gateway.last().view().SerializeAsString() == expert.last().view().SerializeAsString();
  };
  for (int i = 0; i < 100 && !same(); ++i) absl::SleepFor(absl::Milliseconds(20));
  EXPECT_TRUE(same());
}

TEST_P(RegistryTest, LeavingIsSeenAtOnce) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION);
  ASSERT_TRUE(gateway.AwaitMembers(Count(2)));
  const absl::Time begin = absl::Now();
  attention.Leave();
  ASSERT_TRUE(gateway.AwaitMembers(Count(1)));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(1));
}

TEST_P(RegistryTest, ReportsSpread) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION);
  ASSERT_TRUE(gateway.AwaitMembers(Count(2)));
  for (int i = 0; i < 3; ++i) {
    const std::string detail = StrCat("step ", i);
    attention.report().mutable_member()->set_detail(detail);
    attention.SetReport();
    EXPECT_TRUE(gateway.Await([&](const ClusterUpdate& update) {
      return std::any_of(update.view().members().begin(), update.view().members().end(),
                         [&](const auto& member) { return member.detail() == detail; });
    }));
  }
}

TEST_P(RegistryTest, GatewaysAreToldHowBusyOthersAreAndNobodyElseIs) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION),
          expert = Join(cluster::v1::ROLE_EXPERT);
  for (Process* process : {&gateway, &attention, &expert}) ASSERT_TRUE(process->AwaitMembers(Count(3)));
  const absl::Time begin = absl::Now();
  const int told = gateway.statuses_told();
  int views = 0;
  for (uint32_t running = 1; running <= 3; ++running) {
    attention.report().mutable_load()->set_running(running);
    attention.SetReport();
    expert.report().mutable_load()->add_layer_rows_per_s(static_cast<float>(running));
    expert.SetReport();
    EXPECT_TRUE(gateway.AwaitStatuses([&](const ClusterUpdate& update) {
      const auto of = [&](const Process& process) -> cluster::v1::MemberLoad {
        for (const auto& status : update.statuses()) {
          if (NodeId{status.node_id()} == process.id()) return status.load();
        }
        return {};
      };
      return of(attention).running() == running &&
             of(expert).layer_rows_per_s_size() == static_cast<int>(running) && update.leader() != 0;
    }));
    if (running == 1) views = attention.updates();  // by now the placement is at rest
  }
  // About once a second, and to gateways only; for the others nothing has changed.
  EXPECT_LE(gateway.statuses_told() - told, 2 + absl::ToDoubleSeconds(absl::Now() - begin) / 0.8);
  EXPECT_EQ(attention.statuses_told() + expert.statuses_told(), 0);
  EXPECT_EQ(attention.updates(), views);
}

// A stream's writes and its reports once took two locks in opposite orders.
TEST_P(RegistryTest, ReportsAndViewsThatCrossDoNotStopEachOther) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION),
          expert = Join(cluster::v1::ROLE_EXPERT);
  const absl::Time end = absl::Now() + absl::Seconds(2);
  std::vector<std::thread> threads;
  for (Process* process : {&attention, &expert}) {
    threads.emplace_back([process, end] {
      for (int i = 0; absl::Now() < end; ++i) {
        process->report().mutable_member()->set_detail(StrCat("step ", i));
        process->SetReport();
        absl::SleepFor(absl::Microseconds(200));
      }
      process->report().mutable_member()->set_detail("the last one");
      process->SetReport();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(gateway.Await([](const ClusterUpdate& update) {
    return std::count_if(update.view().members().begin(), update.view().members().end(),
                         [](const auto& member) { return member.detail() == "the last one"; }) == 2;
  }));
}

TEST_P(RegistryTest, PlacementSpreads) {
  Process attention = Join(cluster::v1::ROLE_ATTENTION), first = Join(cluster::v1::ROLE_EXPERT),
          second = Join(cluster::v1::ROLE_EXPERT);
  const int units = Units();
  for (Process* expert : {&first, &second}) {
    ASSERT_TRUE(
        expert->Await([&](const ClusterUpdate& update) { return update.assigned_size() == units / 2; }));
  }
  EXPECT_FALSE(attention.last().view().ready());
  first.HostAssigned();
  second.HostAssigned();
  for (Process* process : {&attention, &first, &second}) {
    EXPECT_TRUE(process->Await([&](const ClusterUpdate& update) {
      return update.view().ready() && update.view().placement_size() == units &&
             std::all_of(update.view().placement().begin(), update.view().placement().end(),
                         [](const auto& unit) { return unit.node_ids_size() == 1; });
    })) << process->last().view().not_ready_reason();
  }
  EXPECT_EQ(attention.last().assigned_size(), 0);
}

TEST_P(RegistryTest, TheLastViewStaysInAnOutageAndNobodyFlapsAfterIt) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION);
  ASSERT_TRUE(gateway.AwaitMembers(Count(2)));
  backend_->Kill();
  const int updates = gateway.updates();
  absl::SleepFor(kLease + absl::Seconds(2));
  EXPECT_EQ(gateway.updates(), updates);
  EXPECT_FALSE(gateway.connected());
  backend_->StartAgain();
  const absl::Time limit = absl::Now() + absl::Seconds(15);
  while (!(gateway.connected() && attention.connected()) && absl::Now() < limit) {
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_TRUE(gateway.AwaitMembers(Count(2)));
  EXPECT_TRUE(gateway.connected());
  EXPECT_TRUE(attention.connected());
  // Changes spread again.
  attention.report().mutable_member()->set_draining(true);
  attention.SetReport();
  EXPECT_TRUE(gateway.Await([&](const ClusterUpdate& update) {
    return std::any_of(update.view().members().begin(), update.view().members().end(),
                       [](const auto& member) { return member.draining(); });
  }));
}

class EtcdRegistryTest : public testing::Test {
 protected:
  Process Join(cluster::v1::Role role) { return Process(backend_.address(), Report(RandomNodeId(), role)); }
  std::vector<NodeId> Ids(std::initializer_list<Process*> processes) {
    std::vector<NodeId> ids;
    for (Process* process : processes) ids.push_back(process->id());
    for (const auto& candidate : backend_.candidates()) ids.push_back(candidate->id());
    return ids;
  }
  bool AllHere(std::initializer_list<Process*> processes) {
    for (Process* process : processes) {
      if (!process->AwaitMembers(processes.size() + 2)) return false;
    }
    return true;
  }
  bool AllConnected(std::initializer_list<Process*> processes) {
    const absl::Time limit = absl::Now() + absl::Seconds(15);
    while (absl::Now() < limit) {
      bool all = true;
      for (Process* process : processes) all &= process->connected();
      for (const auto& candidate : backend_.candidates()) all &= candidate->registry().connected();
      if (all) return true;
      absl::SleepFor(absl::Milliseconds(20));
    }
    return false;
  }

  EtcdBackend backend_;
};

TEST_F(EtcdRegistryTest, NobodyIsMissedInAFreezeShorterOrLongerThanTheLease) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION);
  ASSERT_TRUE(AllHere({&gateway, &attention}));
  gateway.MustStay(Ids({&gateway, &attention}));
  for (const absl::Duration freeze :
       {absl::Milliseconds(1500), kLease - absl::Milliseconds(500), kLease + absl::Seconds(3)}) {
    backend_.server().Freeze();
    absl::SleepFor(freeze);
    backend_.server().Thaw();
    EXPECT_TRUE(AllConnected({&gateway, &attention}));
    absl::SleepFor(kLease + absl::Seconds(1));  // until nobody is kept any more
    EXPECT_TRUE(AllHere({&gateway, &attention}));
    EXPECT_FALSE(gateway.missed()) << freeze;
  }
}

TEST_F(EtcdRegistryTest, NobodyIsMissedWhenEtcdComesBackEmpty) {
  Process attention = Join(cluster::v1::ROLE_ATTENTION), first = Join(cluster::v1::ROLE_EXPERT),
          second = Join(cluster::v1::ROLE_EXPERT);
  for (Process* expert : {&first, &second}) {
    ASSERT_TRUE(
        expert->Await([&](const ClusterUpdate& update) { return update.assigned_size() == Units() / 2; }));
    expert->HostAssigned();
  }
  ASSERT_TRUE(attention.Await([](const ClusterUpdate& update) { return update.view().ready(); }));
  const ClusterView before = attention.last().view();
  attention.MustStay(Ids({&attention, &first, &second}));
  backend_.Kill();
  absl::SleepFor(absl::Seconds(1));
  backend_.StartAgainEmpty();
  EXPECT_TRUE(AllConnected({&attention, &first, &second}));
  absl::SleepFor(kLease + absl::Seconds(1));
  EXPECT_FALSE(attention.missed());
  const ClusterView after = attention.last().view();
  EXPECT_TRUE(after.ready()) << after.not_ready_reason();
  EXPECT_EQ(after.members_size(), before.members_size());
  EXPECT_GE(after.epoch().term(), before.epoch().term());
  EXPECT_GE(after.epoch().counter(), before.epoch().counter())
      << "the record was written again, not begun anew";
  etcd::Client client({.endpoints = {backend_.server().address()}});
  EXPECT_EQ(client.GetPrefix("/minke/test/members/")->keys.size(), 5u);
  EXPECT_EQ(client.Get("/minke/test/placement")->keys.size(), 1u);
}

TEST_F(EtcdRegistryTest, WhoDiedInTheOutageIsGoneALeaseAfterIt) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY);
  auto attention =
      std::make_unique<Process>(backend_.address(), Report(RandomNodeId(), cluster::v1::ROLE_ATTENTION));
  ASSERT_TRUE(gateway.AwaitMembers(4));
  backend_.Kill();
  attention.reset();  // cannot say goodbye
  backend_.StartAgainEmpty();
  EXPECT_TRUE(gateway.AwaitMembers(3));
}

TEST_F(EtcdRegistryTest, DeathIsSeenWhenTheLeaseRunsOut) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY);
  etcd::Client client({.endpoints = {backend_.server().address()}});
  // A process that is never heard of again after it registered.
  const MemberReport report = Report(RandomNodeId(), cluster::v1::ROLE_ATTENTION);
  ASSERT_TRUE(gateway.AwaitMembers(3));
  const int64_t lease = *client.GrantLease(kLease);
  ASSERT_TRUE(client
                  .Put(StrCat("/minke/test/members/", ToString(NodeId{report.member().node_id()})),
                       report.SerializeAsString(), lease)
                  .ok());
  EXPECT_TRUE(gateway.AwaitMembers(4));
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(gateway.AwaitMembers(3));
  EXPECT_LT(absl::Now() - begin, kLease + absl::Seconds(2));
}

TEST_F(EtcdRegistryTest, AnotherRouterDecidesWhenTheLeaderLeaves) {
  Process first = Join(cluster::v1::ROLE_EXPERT);
  Candidate* leader = backend_.Leader();
  ASSERT_NE(leader, nullptr);
  ASSERT_TRUE(first.Await([](const ClusterUpdate& update) { return update.assigned_size() == Units(); }));
  const uint32_t counter = first.last().view().epoch().counter();
  std::erase_if(backend_.candidates(), [&](const auto& candidate) { return candidate.get() == leader; });
  Process second = Join(cluster::v1::ROLE_EXPERT);
  EXPECT_TRUE(
      second.Await([](const ClusterUpdate& update) { return update.assigned_size() == Units() / 2; }));
  EXPECT_GT(second.last().view().epoch().counter(), counter) << "it went on from the record";
  EXPECT_TRUE(backend_.candidates()[0]->leading());
}

TEST_F(EtcdRegistryTest, OneLeadsAtATimeAndOldLeadersCannotWrite) {
  Candidate* leader = backend_.Leader();
  ASSERT_NE(leader, nullptr);
  EXPECT_EQ(backend_.candidates()[0]->leading() + backend_.candidates()[1]->leading(), 1);
  registry::EtcdRegistry& registry = leader->registry();
  leader->StopDeciding();
  registry::EtcdState state = registry.AwaitState(0, absl::Seconds(1));
  for (int i = 0; i < 500 && state.record_revision == 0; ++i) {
    state = registry.AwaitState(state.version, absl::Milliseconds(20));
  }
  ASSERT_EQ(state.leader, leader->id());
  // Somebody else wrote since.
  EXPECT_TRUE(absl::IsAborted(
      registry.WriteRecord(state.record, state.leader_revision, state.record_revision - 1).status()));
  const auto written = registry.WriteRecord(state.record, state.leader_revision, state.record_revision);
  ASSERT_TRUE(written.ok()) << written.status();
  // The leader's key is gone and made by another one: what the old one still wants to write is refused.
  etcd::Client client({.endpoints = {backend_.server().address()}});
  ASSERT_TRUE(client.Commit(etcd::Transaction().Delete("/minke/test/leader")).ok());
  EXPECT_TRUE(absl::IsAborted(registry.WriteRecord(state.record, state.leader_revision, *written).status()));
  const absl::Time limit = absl::Now() + absl::Seconds(10);
  const auto other_leads = [&] {
    return std::any_of(
        backend_.candidates().begin(), backend_.candidates().end(),
        [&](const auto& candidate) { return candidate.get() != leader && candidate->leading(); });
  };
  while (!other_leads() && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(20));
  EXPECT_TRUE(other_leads());
}

TEST_F(EtcdRegistryTest, ALeaderThatLosesItsLeaseStopsAtOnce) {
  Candidate* leader = backend_.Leader();
  ASSERT_NE(leader, nullptr);
  backend_.Kill();
  absl::SleepFor(kLease + absl::Seconds(1));
  for (const auto& candidate : backend_.candidates()) EXPECT_FALSE(candidate->leading());
  backend_.StartAgain();
  EXPECT_NE(backend_.Leader(), nullptr);
}

TEST_F(EtcdRegistryTest, ClustersOfAnotherNameShareTheEtcdAndNothingElse) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY);
  MemberReport other = Report(RandomNodeId(), cluster::v1::ROLE_GATEWAY);
  other.set_model_fingerprint("ffffffffffffffff");
  Process elsewhere({.etcd = backend_.server().address(), .cluster = "test2"}, other);
  EXPECT_TRUE(elsewhere.AwaitMembers(1));
  EXPECT_TRUE(gateway.AwaitMembers(3));
}

TEST_F(EtcdRegistryTest, AClusterThatEverybodyLeftMayBecomeOneOfAnotherModel) {
  const registry::RegistryAddress address{.etcd = backend_.server().address(), .cluster = "test3"};
  MemberReport report = Report(RandomNodeId(), cluster::v1::ROLE_GATEWAY);
  auto first = std::make_unique<Process>(address, report);
  ASSERT_TRUE(first->AwaitMembers(1));
  first.reset();
  report.set_model_fingerprint("ffffffffffffffff");
  Process second(address, report);
  EXPECT_TRUE(second.AwaitMembers(1));
}

TEST_F(EtcdRegistryTest, LeavesQuicklyWhileEtcdIsFrozenOrGone) {
  Process gateway = Join(cluster::v1::ROLE_GATEWAY), attention = Join(cluster::v1::ROLE_ATTENTION);
  ASSERT_TRUE(AllHere({&gateway, &attention}));
  backend_.server().Freeze();
  absl::Time begin = absl::Now();
  gateway.Leave();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(4));
  backend_.server().Thaw();
  backend_.Kill();
  begin = absl::Now();
  attention.Leave();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(4));
}

}  // namespace
}  // namespace minke
