#include "cli/checkpoint_command.h"

#include <fstream>
#include <iomanip>
#include <map>
#include <ostream>
#include <set>
#include <sstream>
#include <thread>

#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/model/checkpoint.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/tensors.h"
#include "libs/tokenizer/byte_level_files.h"

namespace minke::cli {
namespace {

std::string_view RoleName(TensorRole role) {
  switch (role) {
    case TensorRole::kAttention:
      return "attention";
    case TensorRole::kRouter:
      return "router";
    case TensorRole::kExpert:
      return "experts";
  }
  return "?";
}

std::string HumanBytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 4; ++unit) bytes /= 1024;
  std::ostringstream text;
  text << std::fixed << std::setprecision(unit == 0 ? 0 : 1) << bytes << " " << units[unit];
  return text.str();
}

}  // namespace

absl::Status InspectCheckpoint(const std::string& directory, std::ostream& out) {
  MK_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::OpenUnchecked(directory));
  const ModelConfig& c = checkpoint->config();
  out << "checkpoint  " << directory << " (" << checkpoint->file_count()
      << (checkpoint->file_count() == 1 ? " file)" : " files)") << "\n"
      << "shape       " << c.num_hidden_layers << " layers, hidden " << c.hidden_size << ", "
      << c.num_attention_heads << " heads of " << c.qk_nope_head_dim << "+" << c.qk_rope_head_dim << "/"
      << c.v_head_dim << ", latent " << c.kv_lora_rank << "+" << c.qk_rope_head_dim << ", q_lora "
      << c.q_lora_rank << ", vocabulary " << c.vocab_size << "\n";
  if (c.n_routed_experts > 0) {
    out << "experts     " << c.n_routed_experts << " routed (top " << c.num_experts_per_tok;
    if (c.topk_method == TopkMethod::kGroupLimitedGreedy)
      out << " in " << c.topk_group << " of " << c.n_group << " groups";
    out << "), " << c.n_shared_experts << " shared, width " << c.moe_intermediate_size << ", in "
        << c.MoeLayers().size() << " layers\n";
  }
  out << "rope        "
      << (c.yarn ? StrCat("yarn, factor ", c.yarn->factor, ", original context ",
                          c.yarn->original_max_position_embeddings)
                 : "plain")
      << ", context " << c.max_position_embeddings << "\n";
  std::map<TensorRole, std::pair<int64_t, int64_t>> per_role;  // bytes, elements
  std::map<std::string, int64_t> per_dtype;
  std::set<std::string> expected;
  for (const TensorSpec& spec : ExpectedTensors(c)) {
    expected.insert(spec.name);
    auto it = checkpoint->tensors().find(spec.name);
    if (it == checkpoint->tensors().end()) continue;
    per_role[spec.role].first += it->second.bytes();
    per_role[spec.role].second += it->second.elements();
    per_dtype[std::string(ToString(it->second.dtype))] += it->second.bytes();
  }
  int64_t elements = 0, bytes = 0;
  for (const auto& [role, size] : per_role) {
    out << std::left << std::setw(12) << RoleName(role) << size.second << " parameters, "
        << HumanBytes(size.first) << "\n";
    bytes += size.first;
    elements += size.second;
  }
  out << "total       " << elements << " parameters, " << HumanBytes(bytes) << " (";
  bool first = true;
  for (const auto& [dtype, size] : per_dtype) {
    out << (first ? "" : ", ") << dtype << " " << HumanBytes(size);
    first = false;
  }
  out << ")\n";
  for (const auto& [name, view] : checkpoint->tensors()) {
    if (!expected.contains(name)) out << "unused      " << name << "\n";
  }
  const std::vector<std::string> problems = checkpoint->Problems();
  for (const std::string& problem : problems) out << "problem     " << problem << "\n";
  if (!problems.empty()) {
    return absl::InvalidArgumentError(StrCat(directory, ": ", problems.size(), " of ", expected.size(),
                                             " tensors missing or misshapen; first: ", problems.front()));
  }
  return absl::OkStatus();
}

absl::Status MakeCheckpointFromFlags(const MakeCheckpointFlags& flags, std::ostream& out) {
  std::ifstream file(flags.config_file, std::ios::binary);
  if (!file)
    return absl::NotFoundError(StrCat(flags.config_file, ": expected a readable config.json, found none"));
  std::stringstream text;
  text << file.rdbuf();
  MakeCheckpointOptions options;
  options.directory = flags.directory;
  options.config_json = text.str();
  options.seed = flags.seed;
  options.dtype = flags.dtype == "f32" ? DType::kF32 : DType::kBF16;
  options.shard_bytes_max = flags.shard_mib << 20;
  options.threads = flags.threads > 0 ? flags.threads : std::max(1u, std::thread::hardware_concurrency());
  MK_RETURN_IF_ERROR(MakeCheckpoint(options));
  if (flags.tokenizer) {
    MK_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(flags.directory));
    MK_RETURN_IF_ERROR(tokenizer::WriteByteLevelTokenizer(
        flags.directory, {.vocab_size = static_cast<uint32_t>(config.vocab_size),
                          .bos_id = config.bos_token_id.value_or(0),
                          .eos_id = config.eos_token_ids.empty() ? 1 : config.eos_token_ids.front()}));
  }
  out << "made " << flags.directory << "\n";
  return absl::OkStatus();
}

}  // namespace minke::cli
