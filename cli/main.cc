// minke: everything a person types.
#include <CLI/CLI.hpp>
#include <iostream>

#include "cli/bench/kernels_command.h"
#include "cli/bench/serve_command.h"
#include "cli/bench/transport_command.h"
#include "cli/chat_command.h"
#include "cli/checkpoint_command.h"
#include "cli/client_tls.h"
#include "cli/demo_command.h"
#include "cli/health_command.h"
#include "cli/plan_command.h"
#include "cli/scale_command.h"
#include "cli/top_command.h"
#include "cli/up_command.h"
#include "libs/base/strings.h"
#include "libs/node/node.h"
#include "libs/tokenizer/tokenize_command.h"

namespace {

// One line on stderr; the exit code of the command.
int Finish(const absl::Status& status) {
  if (status.ok()) return 0;
  std::cerr << "minke: " << status.message() << std::endl;
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace minke;
  node::BlockSignals();  // before any thread starts; commands without children unblock again
  CLI::App app{"Minke serves DeepSeek-V2 with disaggregated experts."};
  app.set_version_flag("--version", MK_VERSION);
  app.require_subcommand(1);
  int exit_code = 0;

  cli::UpFlags up_flags;
  CLI::App* up =
      app.add_subcommand("up", "a whole cluster on this machine: gateway, router, attention, experts");
  cli::AddUpFlags(*up, up_flags);
  up->callback([&] { exit_code = Finish(cli::RunUp(up_flags, nullptr)); });

  cli::UpFlags serve_flags;
  CLI::App* serve = app.add_subcommand("serve", "all roles in one process");
  cli::AddServeFlags(*serve, serve_flags);
  serve->callback([&] { exit_code = Finish(cli::RunServe(serve_flags, nullptr)); });

  cli::ScaleFlags scale_flags;
  CLI::App* scale = app.add_subcommand("scale", "more or fewer processes of a running minke up");
  cli::AddScaleFlags(*scale, scale_flags);
  scale->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::RunScale(scale_flags, std::cout));
  });

  cli::HealthFlags health_flags;
  CLI::App* health = app.add_subcommand("health", "whether a gateway or a member can serve, as exit code");
  cli::AddHealthFlags(*health, health_flags);
  health->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::RunHealth(health_flags));
  });

  cli::TopFlags top_flags;
  CLI::App* top = app.add_subcommand("top", "the cluster in a terminal, once a second");
  cli::AddTopFlags(*top, top_flags);
  top->callback([&] { exit_code = Finish(cli::RunTop(top_flags, std::cout)); });

  cli::DemoFlags demo_flags;
  CLI::App* demo = app.add_subcommand("demo", "start a cluster on a small model and stream a completion");
  demo->add_option("--port", demo_flags.port, "port of the HTTP API; 0: a free one")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  demo->add_option("--checkpoint", demo_flags.checkpoint, "model with a tokenizer (default: random weights)")
      ->check(CLI::ExistingDirectory);
  demo->callback([&] { exit_code = Finish(cli::RunDemo(demo_flags)); });

  cli::ChatFlags chat_flags;
  CLI::App* chat = app.add_subcommand("chat", "talk to a running cluster");
  chat->add_option("--url", chat_flags.url)->capture_default_str();
  cli::AddClientTlsFlags(*chat, chat_flags.tls);
  chat->add_option("--api-key-file", chat_flags.api_key_file, "the first key in it is used");
  chat->add_option("--system", chat_flags.system, "system message");
  chat->add_option("--temperature", chat_flags.temperature)
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  chat->add_option("--top-p", chat_flags.top_p)->check(CLI::Range(0.0, 1.0))->capture_default_str();
  chat->add_option("--max-tokens", chat_flags.max_tokens)
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  chat->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::RunChat(chat_flags, std::cin, std::cout));
  });

  CLI::App* checkpoint = app.add_subcommand("checkpoint", "look at checkpoints, make random ones");
  checkpoint->require_subcommand(1);
  std::string inspect_directory;
  CLI::App* inspect = checkpoint->add_subcommand("inspect", "shapes, sizes per role, what is missing");
  inspect->add_option("DIR", inspect_directory, "checkpoint folder")->required();
  inspect->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::InspectCheckpoint(inspect_directory, std::cout));
  });
  cli::MakeCheckpointFlags make_flags;
  CLI::App* make = checkpoint->add_subcommand("make", "write a checkpoint of random weights");
  make->add_option("DIR", make_flags.directory, "folder to create")->required();
  make->add_option("--config", make_flags.config_file, "config.json of the shape")->required();
  make->add_option("--seed", make_flags.seed, "the same seed gives the same bytes")->capture_default_str();
  make->add_option("--dtype", make_flags.dtype)->check(CLI::IsMember({"bf16", "f32"}))->capture_default_str();
  make->add_option("--shard-mib", make_flags.shard_mib, "size of a shard")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  make->add_option("--threads", make_flags.threads, "0: all cores")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  make->add_flag("--tokenizer", make_flags.tokenizer, "also write a byte-level tokenizer");
  make->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::MakeCheckpointFromFlags(make_flags, std::cout));
  });

  CLI::App* bench = app.add_subcommand("bench", "measure");
  bench->require_subcommand(1);
  cli::bench::ServeFlags bench_serve_flags;
  CLI::App* bench_serve =
      bench->add_subcommand("serve", "load on a server with the OpenAI API; latencies, throughput");
  cli::bench::AddServeFlags(*bench_serve, bench_serve_flags);
  bench_serve->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::bench::RunServe(bench_serve_flags, MK_VERSION, std::cout));
  });

  cli::bench::KernelsFlags bench_kernels_flags;
  CLI::App* bench_kernels = bench->add_subcommand("kernels", "every kernel beside this machine's ceilings");
  cli::bench::AddKernelsFlags(*bench_kernels, bench_kernels_flags);
  bench_kernels->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::bench::RunKernels(bench_kernels_flags, std::cout));
  });

  cli::bench::TransportFlags bench_transport_flags;
  CLI::App* bench_transport =
      bench->add_subcommand("transport", "messages between two processes, beside ucx_perftest");
  cli::bench::AddTransportFlags(*bench_transport, bench_transport_flags);
  bench_transport->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::bench::RunTransport(bench_transport_flags, MK_VERSION, std::cout));
  });

  cli::PlanFlags plan_flags;
  CLI::App* plan = app.add_subcommand("plan", "how many nodes to run, what they reach and cost");
  cli::AddPlanFlags(*plan, plan_flags);
  plan->callback([&] {
    node::UnblockSignals();
    exit_code = Finish(cli::RunPlan(plan_flags, std::cout));
  });

  tokenizer::TokenizeOptions tokenize_options;
  CLI::App* tokenize = app.add_subcommand("tokenize", "standard input to token ids, or back");
  tokenize->add_option("DIR", tokenize_options.directory, "folder with tokenizer.json")->required();
  tokenize->add_flag("--lines", tokenize_options.lines, "one line of ids per line of text");
  tokenize->add_flag("--bos", tokenize_options.bos, "begin with the BOS id");
  tokenize->add_flag("--decode", tokenize_options.decode, "ids to text");
  tokenize->callback([&] {
    node::UnblockSignals();
    exit_code = tokenizer::RunTokenizeCommand(tokenize_options, std::cin, std::cout, std::cerr);
  });

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    std::cerr << "minke: " << error.what() << std::endl;
    return 2;
  }
  return exit_code;
}
