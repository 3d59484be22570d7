#include "libs/model/config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "libs/base/hash.h"
#include "libs/base/json_depth.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"

namespace minke {
namespace {

using Json = nlohmann::json;

constexpr int64_t kDimensionMax = 1 << 24;
// Of all layers together (V2: 9,600): whoever opens a checkpoint lists its tensors.
constexpr int64_t kLayerExpertsMax = 1 << 20;

absl::Status FieldError(std::string_view field, std::string_view expected, const Json* found) {
  std::string text =
      found == nullptr ? "nothing" : found->dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 80) + "...";
  return absl::InvalidArgumentError(
      StrCat("config.json: ", field, ": expected ", expected, ", found ", text));
}

const Json* Find(const Json& object, const char* field) {
  auto it = object.find(field);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

class Reader {
 public:
  explicit Reader(const Json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  // Reads an integer in [min, kDimensionMax]; a missing field is an error unless `otherwise` is given.
  Reader& Int(const char* field, int32_t& out, int64_t min, std::optional<int32_t> otherwise = {}) {
    const Json* found = Find(object_, field);
    if (found == nullptr && otherwise) {
      out = *otherwise;
    } else if (found == nullptr || !found->is_number_integer() ||
               (found->is_number_unsigned() && found->get<uint64_t>() > uint64_t{kDimensionMax}) ||
               found->get<int64_t>() < min || found->get<int64_t>() > kDimensionMax) {
      Fail(FieldError(prefix_ + field, StrCat("an integer in [", min, ", ", kDimensionMax, "]"), found));
    } else {
      out = found->get<int32_t>();
    }
    return *this;
  }
  Reader& Real(const char* field, double& out, double min, std::optional<double> otherwise = {}) {
    const Json* found = Find(object_, field);
    if (found == nullptr && otherwise) {
      out = *otherwise;
    } else if (found == nullptr || !found->is_number() || !std::isfinite(found->get<double>()) ||
               found->get<double>() < min) {
      Fail(FieldError(prefix_ + field, StrCat("a number of at least ", min), found));
    } else {
      out = found->get<double>();
    }
    return *this;
  }
  Reader& Bool(const char* field, bool& out, bool otherwise) {
    const Json* found = Find(object_, field);
    out = otherwise;
    if (found != nullptr && !found->is_boolean()) {
      Fail(FieldError(prefix_ + field, "true or false", found));
    } else if (found != nullptr) {
      out = found->get<bool>();
    }
    return *this;
  }
  // The field, if present, must be one of `allowed`.
  Reader& Text(const char* field, std::string& out, std::vector<std::string> allowed, std::string otherwise) {
    const Json* found = Find(object_, field);
    out = otherwise;
    if (found == nullptr) return *this;
    if (found->is_string()) out = found->get<std::string>();
    if (!found->is_string() || std::find(allowed.begin(), allowed.end(), out) == allowed.end()) {
      std::string expected;
      for (const std::string& a : allowed)
        StrAppend(&expected, expected.empty() ? "" : " or ", "\"", a, "\"");
      Fail(FieldError(prefix_ + field, expected, found));
    }
    return *this;
  }
  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  const absl::Status& status() const { return status_; }

 private:
  const Json& object_;
  std::string prefix_;
  absl::Status status_;
};

absl::Status ReadRope(const Json& json, ModelConfig& config) {
  const char* name = Find(json, "rope_scaling") ? "rope_scaling" : "rope_parameters";
  const Json* rope = Find(json, name);
  double theta = 10000;
  Reader top(json);
  top.Real("rope_theta", theta, 1.0, 10000.0);
  MK_RETURN_IF_ERROR(top.status());
  config.rope_theta = theta;
  if (rope == nullptr) return absl::OkStatus();
  if (!rope->is_object()) return FieldError(name, "an object", rope);
  const std::string prefix = StrCat(name, ".");
  Reader reader(*rope, prefix);
  std::string type;
  reader.Text(Find(*rope, "rope_type") ? "rope_type" : "type", type, {"yarn", "default"}, "default");
  reader.Real("rope_theta", config.rope_theta, 1.0, theta);
  MK_RETURN_IF_ERROR(reader.status());
  if (type == "default") return absl::OkStatus();
  YarnConfig yarn;
  reader.Real("factor", yarn.factor, 1.0)
      .Int("original_max_position_embeddings", yarn.original_max_position_embeddings, 1)
      .Real("beta_fast", yarn.beta_fast, 0, 32.0)
      .Real("beta_slow", yarn.beta_slow, 0, 1.0)
      .Real("mscale", yarn.mscale, 0, 1.0)
      .Real("mscale_all_dim", yarn.mscale_all_dim, 0, 0.0);
  config.yarn = yarn;
  return reader.status();
}

absl::Status ReadTokenIds(const Json& json, const char* field, int32_t vocab_size,
                          std::vector<uint32_t>& out) {
  const Json* found = Find(json, field);
  if (found == nullptr) return absl::OkStatus();
  const Json list = found->is_array() ? *found : Json::array({*found});
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size) {
      return FieldError(field, StrCat("token ids in [0, ", vocab_size, ")"), found);
    }
    out.push_back(id.get<uint32_t>());
  }
  return absl::OkStatus();
}

absl::Status ReadExperts(const Json& json, ModelConfig& c) {
  Reader reader(json);
  reader.Int("n_routed_experts", c.n_routed_experts, 0, 0);
  MK_RETURN_IF_ERROR(reader.status());
  if (c.n_routed_experts == 0) return absl::OkStatus();
  std::string method, scoring;
  reader.Int("moe_intermediate_size", c.moe_intermediate_size, 1)
      .Int("num_experts_per_tok", c.num_experts_per_tok, 1)
      .Int("n_shared_experts", c.n_shared_experts, 0, 0)
      .Int("first_k_dense_replace", c.first_k_dense_replace, 0)
      .Int("moe_layer_freq", c.moe_layer_freq, 1, 1)
      .Real("routed_scaling_factor", c.routed_scaling_factor, 0)
      .Bool("norm_topk_prob", c.norm_topk_prob, false)
      .Text("scoring_func", scoring, {"softmax"}, "softmax")
      .Text("topk_method", method, {"greedy", "group_limited_greedy"}, "greedy");
  if (method == "group_limited_greedy") {
    c.topk_method = TopkMethod::kGroupLimitedGreedy;
    reader.Int("n_group", c.n_group, 1).Int("topk_group", c.topk_group, 1);
  } else {
    reader.Int("n_group", c.n_group, 1, 1).Int("topk_group", c.topk_group, 1, 1);
  }
  MK_RETURN_IF_ERROR(reader.status());
  if (c.n_routed_experts > 65535)
    return FieldError("n_routed_experts", "at most 65535", Find(json, "n_routed_experts"));
  if (int64_t{c.num_hidden_layers} * c.n_routed_experts > kLayerExpertsMax) {
    return FieldError(
        "n_routed_experts",
        StrCat("at most ", kLayerExpertsMax / c.num_hidden_layers, " with ", c.num_hidden_layers, " layers"),
        Find(json, "n_routed_experts"));
  }
  if (c.num_experts_per_tok > c.n_routed_experts || c.num_experts_per_tok > 64) {
    return FieldError("num_experts_per_tok",
                      StrCat("at most min(64, n_routed_experts = ", c.n_routed_experts, ")"),
                      Find(json, "num_experts_per_tok"));
  }
  if (c.topk_method == TopkMethod::kGroupLimitedGreedy) {
    if (c.n_group > 64 || c.n_routed_experts % c.n_group != 0) {
      return FieldError("n_group",
                        StrCat("a divisor of n_routed_experts = ", c.n_routed_experts, ", at most 64"),
                        Find(json, "n_group"));
    }
    if (c.topk_group > c.n_group || c.topk_group * (c.n_routed_experts / c.n_group) < c.num_experts_per_tok) {
      return FieldError(
          "topk_group",
          StrCat("at most n_group = ", c.n_group, " and room for ", c.num_experts_per_tok, " experts"),
          Find(json, "topk_group"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::Parse(std::string_view text) {
  if (NestsTooDeep(text)) {
    return absl::InvalidArgumentError(
        StrCat("config.json: expected at most ", kJsonDepthMax, " levels of nesting, found more"));
  }
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded() || !json.is_object()) {
    return absl::InvalidArgumentError("config.json: expected a JSON object, found something else");
  }
  ModelConfig c;
  std::string model_type, activation;
  bool attention_bias = false;
  Reader reader(json);
  reader.Text("model_type", model_type, {"deepseek_v2"}, "")
      .Text("hidden_act", activation, {"silu"}, "silu")
      .Int("vocab_size", c.vocab_size, 1)
      .Int("hidden_size", c.hidden_size, 1)
      .Int("num_hidden_layers", c.num_hidden_layers, 1)
      .Int("num_attention_heads", c.num_attention_heads, 1)
      .Int("q_lora_rank", c.q_lora_rank, 0, 0)
      .Int("kv_lora_rank", c.kv_lora_rank, 1)
      .Int("qk_nope_head_dim", c.qk_nope_head_dim, 1)
      .Int("qk_rope_head_dim", c.qk_rope_head_dim, 2)
      .Int("v_head_dim", c.v_head_dim, 1)
      .Int("max_position_embeddings", c.max_position_embeddings, 1)
      .Real("rms_norm_eps", c.rms_norm_eps, 0)
      .Bool("tie_word_embeddings", c.tie_word_embeddings, false)
      .Bool("attention_bias", attention_bias, false);
  MK_RETURN_IF_ERROR(reader.status());
  if (model_type.empty()) return FieldError("model_type", "\"deepseek_v2\"", nullptr);
  if (attention_bias) return FieldError("attention_bias", "false", Find(json, "attention_bias"));
  if (c.qk_rope_head_dim % 2 != 0)
    return FieldError("qk_rope_head_dim", "an even number", Find(json, "qk_rope_head_dim"));
  if (c.num_hidden_layers > 65535)
    return FieldError("num_hidden_layers", "at most 65535", Find(json, "num_hidden_layers"));
  MK_RETURN_IF_ERROR(ReadExperts(json, c));
  bool any_dense = c.n_routed_experts == 0;
  for (int32_t layer = 0; layer < c.num_hidden_layers; ++layer) any_dense |= !c.IsMoeLayer(layer);
  Reader dense(json);
  if (any_dense) {
    dense.Int("intermediate_size", c.intermediate_size, 1);
  } else {
    dense.Int("intermediate_size", c.intermediate_size, 0, 0);
  }
  MK_RETURN_IF_ERROR(dense.status());
  MK_RETURN_IF_ERROR(ReadRope(json, c));
  std::vector<uint32_t> bos;
  MK_RETURN_IF_ERROR(ReadTokenIds(json, "bos_token_id", c.vocab_size, bos));
  if (!bos.empty()) c.bos_token_id = bos.front();
  MK_RETURN_IF_ERROR(ReadTokenIds(json, "eos_token_id", c.vocab_size, c.eos_token_ids));
  return c;
}

absl::StatusOr<ModelConfig> ModelConfig::Load(const std::string& directory) {
  const std::string path = directory + "/config.json";
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(StrCat(path, ": expected a readable file, found none"));
  std::stringstream text;
  text << file.rdbuf();
  absl::StatusOr<ModelConfig> config = Parse(text.str());
  if (!config.ok()) return Annotate(config.status(), directory);
  return config;
}

std::vector<int32_t> ModelConfig::MoeLayers() const {
  std::vector<int32_t> layers;
  for (int32_t layer = 0; layer < num_hidden_layers; ++layer) {
    if (IsMoeLayer(layer)) layers.push_back(layer);
  }
  return layers;
}

int32_t ModelConfig::placement_groups() const {
  if (topk_method == TopkMethod::kGroupLimitedGreedy && n_group > 1) return n_group;
  return std::min(8, n_routed_experts);
}

ExpertRange ModelConfig::GroupExperts(int32_t group) const {
  const int64_t groups = placement_groups(), experts = n_routed_experts;
  return {static_cast<int32_t>(group * experts / groups),
          static_cast<int32_t>((group + 1) * experts / groups)};
}

int32_t ModelConfig::GroupOfExpert(int32_t expert) const {
  // Largest g with floor(g * experts / groups) <= expert.
  const int64_t groups = placement_groups(), experts = n_routed_experts;
  return static_cast<int32_t>(((expert + 1) * groups - 1) / experts);
}

int32_t ModelConfig::fan_out_max() const {
  const int32_t limit =
      topk_method == TopkMethod::kGroupLimitedGreedy && n_group > 1 ? topk_group : placement_groups();
  return std::min(limit, num_experts_per_tok);
}

double ModelConfig::softmax_scale() const {
  const double scale = 1.0 / std::sqrt(static_cast<double>(qk_head_dim()));
  if (!yarn || yarn->mscale_all_dim == 0 || yarn->factor <= 1) return scale;
  const double m = 0.1 * yarn->mscale_all_dim * std::log(yarn->factor) + 1.0;
  return scale * m * m;
}

uint64_t ModelConfig::Hash() const {
  std::string text =
      StrCat(vocab_size, ",", hidden_size, ",", intermediate_size, ",", moe_intermediate_size, ",",
             num_hidden_layers, ",", num_attention_heads, ",", q_lora_rank, ",", kv_lora_rank);
  StrAppend(&text, ",", qk_nope_head_dim, ",", qk_rope_head_dim, ",", v_head_dim, ",", n_routed_experts, ",",
            n_shared_experts, ",", num_experts_per_tok, ",", n_group, ",", topk_group);
  StrAppend(&text, ",", topk_method == TopkMethod::kGreedy, ",", routed_scaling_factor, ",", norm_topk_prob,
            ",", first_k_dense_replace, ",", moe_layer_freq, ",", max_position_embeddings, ",", rope_theta,
            ",", rms_norm_eps, ",", tie_word_embeddings);
  if (yarn) {
    StrAppend(&text, ",yarn,", yarn->factor, ",", yarn->original_max_position_embeddings, ",",
              yarn->beta_fast, ",", yarn->beta_slow, ",", yarn->mscale, ",", yarn->mscale_all_dim);
  }
  return Fnv1a(text);
}

}  // namespace minke
