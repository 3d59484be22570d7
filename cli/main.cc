// minke: everything a person types.
#include <iostream>

#include <CLI/CLI.hpp>

#include "cli/checkpoint_command.h"
#include "libs/base/strings.h"
#include "libs/tokenizer/tokenize_command.h"

namespace {

// One line on stderr; the exit code of a failed command.
int Fail(const absl::Status& status) {
  std::cerr << "minke: " << status.message() << std::endl;
  return 1;
}
int Finish(const absl::Status& status) { return status.ok() ? 0 : Fail(status); }

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Minke serves DeepSeek-V2 with disaggregated experts."};
  app.require_subcommand(1);
  int exit_code = 0;

  CLI::App* checkpoint = app.add_subcommand("checkpoint", "look at checkpoints, make random ones");
  checkpoint->require_subcommand(1);
  std::string inspect_directory;
  CLI::App* inspect = checkpoint->add_subcommand("inspect", "shapes, sizes per role, what is missing");
  inspect->add_option("DIR", inspect_directory, "checkpoint folder")->required();
  inspect->callback([&] { exit_code = Finish(minke::cli::InspectCheckpoint(inspect_directory, std::cout)); });
  minke::cli::MakeCheckpointFlags make_flags;
  CLI::App* make = checkpoint->add_subcommand("make", "write a checkpoint of random weights");
  make->add_option("DIR", make_flags.directory, "folder to create")->required();
  make->add_option("--config", make_flags.config_file, "config.json of the shape")->required();
  make->add_option("--seed", make_flags.seed, "the same seed gives the same bytes");
  make->add_option("--dtype", make_flags.dtype)->check(CLI::IsMember({"bf16", "f32"}));
  make->add_option("--shard-mib", make_flags.shard_mib, "size of a shard")->check(CLI::Range(1, 1 << 20));
  make->add_option("--threads", make_flags.threads, "0: all cores")->check(CLI::Range(0, 1024));
  make->add_flag("--tokenizer", make_flags.tokenizer, "also write a byte-level tokenizer");
  make->callback([&] { exit_code = Finish(minke::cli::MakeCheckpointFromFlags(make_flags, std::cout)); });

  minke::tokenizer::TokenizeOptions tokenize_options;
  CLI::App* tokenize = app.add_subcommand("tokenize", "standard input to token ids, or back");
  tokenize->add_option("DIR", tokenize_options.directory, "folder with tokenizer.json")->required();
  tokenize->add_flag("--lines", tokenize_options.lines, "one line of ids per line of text");
  tokenize->add_flag("--bos", tokenize_options.bos, "begin with the BOS id");
  tokenize->add_flag("--decode", tokenize_options.decode, "ids to text");
  tokenize->callback([&] {
    exit_code = minke::tokenizer::RunTokenizeCommand(tokenize_options, std::cin, std::cout, std::cerr);
  });

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);   // --help
    std::cerr << "minke: " << error.what() << std::endl;
    return 2;
  }
  return exit_code;
}
