#include "libs/model/checkpoint.h"

#include <fstream>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "libs/model/make_checkpoint.h"
#include "libs/model/testing/testing_checkpoint.h"
#include "nlohmann/json.hpp"

namespace minke {
namespace {

using testing::HasSubstr;
using testing_support::TempDir;
using testing_support::WriteFile;

std::string ReadFile(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

std::string Make(const TempDir& dir, uint64_t seed = 7, DType dtype = DType::kBF16,
                 int64_t shard_bytes = int64_t{1} << 30) {
  std::string path = StrCat(dir.path(), "/model-", seed, ToString(dtype), shard_bytes);
  const absl::Status made =
      MakeCheckpoint({path, testing_support::TinyConfigJson(), seed, dtype, shard_bytes, 2});
  EXPECT_TRUE(made.ok()) << made;
  return path;
}

TEST(MakeCheckpoint, IsCompleteAndReproducible) {
  TempDir dir, other;
  const std::string a = Make(dir), b = Make(other);
  EXPECT_EQ(ReadFile(a + "/model.safetensors"), ReadFile(b + "/model.safetensors"));
  auto checkpoint = Checkpoint::Open(a);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->tensors().size(), ExpectedTensors((*checkpoint)->config()).size());
  double sum = 0, squares = 0;
  const TensorView& embedding = (*checkpoint)->tensors().at("model.embed_tokens.weight");
  std::vector<float> values(embedding.elements());
  embedding.Read(0, values);
  for (const float v : values) sum += v, squares += v * v;
  EXPECT_NEAR(sum / values.size(), 0, 0.03);
  EXPECT_NEAR(squares / values.size(), 1, 0.03);
}

TEST(MakeCheckpoint, ShardsHoldTheSameTensors) {
  TempDir dir;
  auto whole = Checkpoint::Open(Make(dir)).value(),
       parts = Checkpoint::Open(Make(dir, 7, DType::kBF16, 300000)).value();
  EXPECT_EQ(whole->file_count(), 1);
  EXPECT_GT(parts->file_count(), 3);
  for (const auto& [name, view] : whole->tensors()) {
    const TensorView& other = parts->tensors().at(name);
    ASSERT_EQ(view.shape, other.shape);
    ASSERT_EQ(std::memcmp(view.data, other.data, view.bytes()), 0) << name;
  }
  EXPECT_NE(whole->fingerprint(), Checkpoint::Open(Make(dir, 8)).value()->fingerprint());
}

TEST(MakeCheckpoint, RefusesToOverwrite) {
  TempDir dir;
  const std::string path = Make(dir);
  EXPECT_EQ(MakeCheckpoint({path, testing_support::TinyConfigJson()}).code(),
            absl::StatusCode::kAlreadyExists);
}

TEST(Checkpoint, ReadsEveryFloatFormat) {
  TempDir dir;
  WriteFile(dir.path() + "/config.json", testing_support::TinyConfigJson());
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},)"
      R"("f":{"dtype":"F32","shape":[1,1],"data_offsets":[5,9]}})";  // f is unaligned
  const uint64_t bytes = header.size();
  const uint16_t half[] = {0x3c00, 0xc000};
  const float full = 3.25f;
  WriteFile(dir.path() + "/model.safetensors", std::string(reinterpret_cast<const char*>(&bytes), 8) +
                                                   header +
                                                   std::string(reinterpret_cast<const char*>(half), 4) + "x" +
                                                   std::string(reinterpret_cast<const char*>(&full), 4));
  auto checkpoint = Checkpoint::OpenUnchecked(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  std::vector<float> h(2), f(1);
  (*checkpoint)->tensors().at("h").Read(0, h);
  (*checkpoint)->tensors().at("f").Read(0, f);
  EXPECT_EQ(h, (std::vector<float>{1, -2}));
  EXPECT_EQ(f[0], 3.25f);
}

struct Damage {
  const char* what;
  std::function<void(const std::string& dir)> apply;
  std::vector<std::string> message;  // substrings
};

TEST(Checkpoint, EveryDamageGetsOneClearError) {
  const auto edit_header = [](auto edit) {
    return [edit](const std::string& dir) {
      std::string text = ReadFile(dir + "/model.safetensors");
      uint64_t bytes;
      std::memcpy(&bytes, text.data(), 8);
      nlohmann::json header = nlohmann::json::parse(text.substr(8, bytes));
      edit(header);
      const std::string changed = header.dump();
      const uint64_t size = changed.size();
      WriteFile(dir + "/model.safetensors",
                std::string(reinterpret_cast<const char*>(&size), 8) + changed + text.substr(8 + bytes));
    };
  };
  const std::string norm = "model.norm.weight";
  const Damage damages[] = {
      {"no config",
       [](const std::string& d) { std::filesystem::remove(d + "/config.json"); },
       {"config.json", "found none"}},
      {"no weights",
       [](const std::string& d) { std::filesystem::remove(d + "/model.safetensors"); },
       {"model.safetensors"}},
      {"empty file",
       [](const std::string& d) { WriteFile(d + "/model.safetensors", ""); },
       {"at least 8 bytes", "found 0"}},
      {"cut off",
       [](const std::string& d) { std::filesystem::resize_file(d + "/model.safetensors", 100000); },
       {"model.safetensors"}},
      {"cut off a little",
       [](const std::string& d) {
         std::filesystem::resize_file(d + "/model.safetensors",
                                      std::filesystem::file_size(d + "/model.safetensors") - 1);
       },
       {"tensor", "data_offsets inside the file"}},
      {"huge header",
       [](const std::string& d) { WriteFile(d + "/model.safetensors", std::string(16, '\xff')); },
       {"header", "at most"}},
      {"no JSON",
       [](const std::string& d) {
         WriteFile(d + "/model.safetensors", std::string("\x04\0\0\0\0\0\0\0oops", 12));
       },
       {"header"}},
      {"header that nests without end",
       [](const std::string& d) {
         const std::string deep = "{\"a\": " + std::string(200'000, '[') + std::string(200'000, ']') + "}";
         const uint64_t size = deep.size();
         WriteFile(d + "/model.safetensors",
                   std::string(reinterpret_cast<const char*>(&size), 8) + deep + std::string(64, 'x'));
       },
       {"header", "levels of nesting"}},
      {"index that nests without end",
       [](const std::string& d) {
         WriteFile(
             d + "/model.safetensors.index.json",
             "{\"weight_map\": {\"a\": " + std::string(200'000, '[') + std::string(200'000, ']') + "}}");
       },
       {"index", "levels of nesting"}},
      {"missing tensor",
       edit_header([&](auto& h) { h.erase(norm); }),
       {norm, "expected shape [64]", "found nothing"}},
      {"misshapen tensor",
       edit_header([&](auto& h) {
         h[norm]["shape"] = {32, 2};
       }),
       {norm, "expected shape [64]", "found [32, 2]"}},
      {"wrong dtype",
       edit_header([&](auto& h) { h[norm]["dtype"] = "I64"; }),
       {norm, "BF16, F16 or F32", "I64"}},
      {"bytes do not fit the shape",
       edit_header([&](auto& h) { h[norm]["dtype"] = "F32"; }),
       {norm, "256 bytes", "found 128"}},
      {"offset outside",
       edit_header([&](auto& h) {
         h[norm]["data_offsets"] = {1ull << 40, (1ull << 40) + 128};
       }),
       {norm, "data_offsets inside"}},
      {"offsets reversed",
       edit_header([&](auto& h) {
         h[norm]["data_offsets"] = {128, 0};
       }),
       {norm, "data_offsets"}},
      {"overflowing shape",
       edit_header([&](auto& h) {
         h[norm]["shape"] = {1ull << 39, 1ull << 39};
       }),
       {norm, "a shape that fits"}},
      {"negative shape", edit_header([&](auto& h) { h[norm]["shape"] = {-64}; }), {norm, "whole numbers"}},
      {"entry is a number", edit_header([&](auto& h) { h[norm] = 3; }), {norm, "an object"}},
      {"index without its shard",
       [](const std::string& d) {
         WriteFile(d + "/model.safetensors.index.json", R"({"weight_map":{"a":"gone.safetensors"}})");
       },
       {"gone.safetensors"}},
      {"index that leaves the folder",
       [](const std::string& d) {
         WriteFile(d + "/model.safetensors.index.json", R"({"weight_map":{"a":"../x.safetensors"}})");
       },
       {"a file name"}},
      {"index that lies",
       [](const std::string& d) {
         WriteFile(d + "/model.safetensors.index.json", R"({"weight_map":{"nobody":"model.safetensors"}})");
       },
       {"nobody", "as the index says"}},
  };
  for (const Damage& damage : damages) {
    TempDir dir;
    const std::string path = Make(dir);
    damage.apply(path);
    const auto checkpoint = Checkpoint::Open(path);
    ASSERT_FALSE(checkpoint.ok()) << damage.what;
    const std::string message(checkpoint.status().message());
    for (const std::string& part : damage.message) EXPECT_THAT(message, HasSubstr(part)) << damage.what;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace minke
