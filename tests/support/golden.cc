#include "tests/support/golden.h"

#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

#include "libs/base/status.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "nlohmann/json.hpp"

namespace minke::testing_support {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  MK_CHECK(file.good());
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

template <typename To, typename From>
std::vector<To> ReadTensor(const std::string& file, const std::string& name) {
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), 8);
  const nlohmann::json header = nlohmann::json::parse(file.substr(8, header_bytes));
  const auto& entry = header.at(name);
  const size_t begin = entry.at("data_offsets")[0], end = entry.at("data_offsets")[1];
  std::vector<From> values((end - begin) / sizeof(From));
  std::memcpy(values.data(), file.data() + 8 + header_bytes + begin, end - begin);
  return {values.begin(), values.end()};
}

}  // namespace

const Golden& Golden::Get(const std::string& name) {
  static std::map<std::string, std::unique_ptr<Golden>> cache;
  static TempDir root;
  std::unique_ptr<Golden>& golden = cache[name];
  if (golden != nullptr) return *golden;
  golden = std::make_unique<Golden>();
  const std::string base = "tests/golden/" + name;
  golden->checkpoint = root.path() + "/" + name;
  const absl::Status made = MakeCheckpoint({.directory = golden->checkpoint,
                                            .config_json = ReadFile(base + ".json"),
                                            .seed = 1,
                                            .dtype = name == "plain" ? DType::kF32 : DType::kBF16});
  MK_CHECK(made.ok());
  const std::string file = ReadFile(base + ".safetensors");
  golden->input_ids = ReadTensor<uint32_t, int32_t>(file, "input_ids");
  golden->token_logprobs = ReadTensor<float, float>(file, "token_logprobs");
  golden->routing = ReadTensor<int, int32_t>(file, "routing");
  golden->routing_margins = ReadTensor<float, float>(file, "routing_margins");
  golden->greedy_prompt = ReadTensor<uint32_t, int32_t>(file, "greedy_prompt");
  golden->greedy_ids = ReadTensor<uint32_t, int32_t>(file, "greedy_ids");
  golden->greedy_gaps = ReadTensor<float, float>(file, "greedy_gaps");
  golden->bf16_forced_token_logprobs = ReadTensor<float, float>(file, "bf16_forced_token_logprobs");
  return *golden;
}

}  // namespace minke::testing_support
