#include "cli/role_arguments.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::cli {
namespace {

using ::testing::Contains;
using ::testing::Each;
using ::testing::IsSupersetOf;
using ::testing::Not;
using ::testing::StartsWith;

const UpFlags kFlags{.checkpoint = "/model", .replicas = 2, .precision = "exact"};
const LocalAddresses kStatic{
    .secret_file = "/run/secret", .router = "127.0.0.1:7000", .http = "127.0.0.1:8000"};
const LocalAddresses kEtcd{.secret_file = "/run/secret", .etcd = "127.0.0.1:2379", .http = "127.0.0.1:8000"};

TEST(RoleArguments, RouterChoosesItsPortOnceOnly) {
  LocalAddresses first = kStatic;
  first.router.clear();
  EXPECT_THAT(RouterArguments(kFlags, first, 3), Not(Contains(StartsWith("--listen"))));
  EXPECT_THAT(RouterArguments(kFlags, kStatic, 3),
              IsSupersetOf({"--listen=127.0.0.1:7000", "--experts=3", "--replicas=2"}));
}

TEST(RoleArguments, RoutersThatShareEtcdHaveNoFixedPort) {
  EXPECT_THAT(RouterArguments(kFlags, kEtcd, 3), Not(Contains(StartsWith("--listen"))));
  EXPECT_THAT(RouterArguments(kFlags, kEtcd, 3),
              IsSupersetOf({"--registry=etcd", "--etcd=127.0.0.1:2379", "--cluster=minke"}));
}

TEST(RoleArguments, MembersNameTheRouterOrEtcd) {
  for (const auto& arguments :
       {ExpertArguments(kFlags, kStatic, ""), AttentionArguments(kFlags, kStatic, "", false),
        GatewayArguments(kFlags, kStatic)}) {
    EXPECT_THAT(arguments, Contains("--router=127.0.0.1:7000"));
    EXPECT_THAT(arguments, Not(Contains(StartsWith("--etcd"))));
  }
  for (const auto& arguments :
       {ExpertArguments(kFlags, kEtcd, ""), AttentionArguments(kFlags, kEtcd, "", false),
        GatewayArguments(kFlags, kEtcd)}) {
    EXPECT_THAT(arguments, Contains("--etcd=127.0.0.1:2379"));
    EXPECT_THAT(arguments, Not(Contains(StartsWith("--router"))));
  }
}

TEST(RoleArguments, TheGatewayOperatesOnlyWithATokenFile) {
  EXPECT_THAT(GatewayArguments(kFlags, kStatic), Not(Contains(StartsWith("--operator"))));
  UpFlags flags = kFlags;
  flags.operator_token_file = "/run/tokens";
  LocalAddresses addresses = kStatic;
  addresses.operator_socket = "/run/operator.sock";
  EXPECT_THAT(GatewayArguments(flags, addresses),
              IsSupersetOf({"--operator-socket=/run/operator.sock", "--operator-token-file=/run/tokens"}));
}

TEST(RoleArguments, EveryValueIsGiven) {
  UpFlags flags = kFlags;
  flags.trace_file = "/tmp/trace.json";
  EXPECT_THAT(AttentionArguments(flags, kStatic, "0-3", true),
              IsSupersetOf({"--trace-file=/tmp/trace.json", "--cpus=0-3"}));
  EXPECT_THAT(AttentionArguments(flags, kStatic, "", false), Not(Contains(StartsWith("--trace-file"))));
  for (const auto& arguments :
       {RouterArguments(kFlags, kStatic, 1), ExpertArguments(kFlags, kStatic, ""),
        AttentionArguments(kFlags, kStatic, "", true), GatewayArguments(kFlags, kStatic)}) {
    EXPECT_THAT(arguments, Each(Not(::testing::EndsWith("="))));
  }
}

}  // namespace
}  // namespace minke::cli
