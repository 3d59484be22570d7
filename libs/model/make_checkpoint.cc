#include "libs/model/make_checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "libs/base/dtype.h"
#include "libs/base/hash.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"

namespace minke {
namespace {

struct Shard {
  std::string file;
  std::string header;
  std::vector<TensorSpec> specs;
  std::vector<int64_t> offsets;  // of each tensor's data, from the beginning of the file
  int64_t bytes = 0;
};

uint64_t SplitMix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Near-normal with unit variance: the sum of four 16-bit uniforms (Irwin-Hall), a counter-based draw, so
// that any part of a tensor can be made on any thread. Integers first: the same bits everywhere.
float Normalish(uint64_t key, uint64_t index) {
  const uint64_t r = SplitMix(key ^ SplitMix(index));
  const int32_t sum =
      static_cast<int32_t>((r & 0xffff) + ((r >> 16) & 0xffff) + ((r >> 32) & 0xffff) + (r >> 48)) - 131070;
  return static_cast<float>(sum) * (1.0f / 37837.2f);  // 65536 * sqrt(4 / 12)
}

struct Distribution {
  float mean = 0, deviation = 1;
};

Distribution DistributionOf(const TensorSpec& spec) {
  if (spec.shape.size() == 1) return {1.0f, 0.1f};
  if (absl::StrContains(spec.name, "embed_tokens")) return {0.0f, 1.0f};
  const float gain = absl::EndsWith(spec.name, "mlp.gate.weight") ? 4.0f : 1.2f;
  return {0.0f, gain / std::sqrt(static_cast<float>(spec.shape[1]))};
}

void Fill(const TensorSpec& spec, DType dtype, uint64_t seed, int64_t begin, int64_t end, std::byte* out) {
  const Distribution distribution = DistributionOf(spec);
  const uint64_t key = SplitMix(seed) ^ Fnv1a(spec.name);
  for (int64_t i = begin; i < end; ++i) {
    const float value = distribution.mean + distribution.deviation * Normalish(key, static_cast<uint64_t>(i));
    if (dtype == DType::kF32) {
      std::memcpy(out + 4 * i, &value, 4);
    } else {
      const bf16 bits = F32ToBF16(value);
      std::memcpy(out + 2 * i, &bits, 2);
    }
  }
}

int64_t Elements(const TensorSpec& spec) {
  int64_t n = 1;
  for (const int64_t dimension : spec.shape) n *= dimension;
  return n;
}

std::vector<Shard> PlanShards(const std::vector<TensorSpec>& specs, DType dtype, int64_t shard_bytes_max) {
  std::vector<Shard> shards(1);
  for (const TensorSpec& spec : specs) {
    const int64_t bytes = Elements(spec) * DTypeBytes(dtype);
    if (!shards.back().specs.empty() && shards.back().bytes + bytes > shard_bytes_max) shards.emplace_back();
    shards.back().specs.push_back(spec);
    shards.back().offsets.push_back(shards.back().bytes);
    shards.back().bytes += bytes;
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    Shard& shard = shards[i];
    shard.file = shards.size() == 1 ? "model.safetensors"
                                    : absl::StrFormat("model-%05d-of-%06d.safetensors", i + 1, shards.size());
    nlohmann::json header = nlohmann::json::object();
    for (size_t t = 0; t < shard.specs.size(); ++t) {
      const int64_t bytes = Elements(shard.specs[t]) * DTypeBytes(dtype);
      header[shard.specs[t].name] = {{"dtype", std::string(ToString(dtype))},
                                     {"shape", shard.specs[t].shape},
                                     {"data_offsets", {shard.offsets[t], shard.offsets[t] + bytes}}};
    }
    shard.header = header.dump();
    shard.header.resize((shard.header.size() + 63) / 64 * 64, ' ');
    const int64_t data_begin = 8 + static_cast<int64_t>(shard.header.size());
    for (int64_t& offset : shard.offsets) offset += data_begin;
    shard.bytes += data_begin;
  }
  return shards;
}

absl::Status WriteShard(const Shard& shard, const MakeCheckpointOptions& options) {
  const std::string path = options.directory + "/" + shard.file;
  const auto failed = [&](std::string_view what) {
    return absl::UnknownError(StrCat(path, ": ", what, ": ", std::strerror(errno)));
  };
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return failed("open");
  const absl::Cleanup close_fd = [fd] { ::close(fd); };
  // Allocated up front: a full disk is an error here instead of a bus error below.
  if (const int error = ::posix_fallocate(fd, 0, shard.bytes); error != 0) {
    errno = error;
    return failed(StrCat("reserving ", shard.bytes, " bytes"));
  }
  void* mapped = ::mmap(nullptr, shard.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) return failed("mmap");
  auto* bytes = static_cast<std::byte*>(mapped);
  const uint64_t header_bytes = shard.header.size();
  std::memcpy(bytes, &header_bytes, 8);
  std::memcpy(bytes + 8, shard.header.data(), header_bytes);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t t = next++; t < shard.specs.size(); t = next++) {
      Fill(shard.specs[t], options.dtype, options.seed, 0, Elements(shard.specs[t]),
           bytes + shard.offsets[t]);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < options.threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  ::munmap(mapped, shard.bytes);
  return absl::OkStatus();
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text << "\n";
  file.close();
  if (!file) return absl::UnknownError(StrCat(path, ": expected to write it, found: ", std::strerror(errno)));
  return absl::OkStatus();
}

}  // namespace

absl::Status MakeCheckpoint(const MakeCheckpointOptions& options) {
  MK_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Parse(options.config_json));
  if (options.dtype == DType::kF16)
    return absl::InvalidArgumentError("dtype: expected BF16 or F32, found F16");
  std::error_code error;
  std::filesystem::create_directories(options.directory, error);
  if (error) return absl::UnknownError(StrCat(options.directory, ": ", error.message()));
  for (const char* file : {"config.json", "model.safetensors", "model.safetensors.index.json"}) {
    if (std::filesystem::exists(options.directory + "/" + file)) {
      return absl::AlreadyExistsError(
          StrCat(options.directory, ": expected no checkpoint there, found ", file));
    }
  }
  const std::vector<Shard> shards =
      PlanShards(ExpectedTensors(config), options.dtype, options.shard_bytes_max);
  for (const Shard& shard : shards) MK_RETURN_IF_ERROR(WriteShard(shard, options));
  if (shards.size() > 1) {
    nlohmann::json index;
    int64_t total = 0;
    for (const Shard& shard : shards) {
      for (const TensorSpec& spec : shard.specs) {
        index["weight_map"][spec.name] = shard.file;
        total += Elements(spec) * DTypeBytes(options.dtype);
      }
    }
    index["metadata"]["total_size"] = total;
    MK_RETURN_IF_ERROR(WriteText(options.directory + "/model.safetensors.index.json", index.dump(1)));
  }
  nlohmann::json json = nlohmann::json::parse(options.config_json);
  json["torch_dtype"] = options.dtype == DType::kF32 ? "float32" : "bfloat16";
  return WriteText(options.directory + "/config.json", json.dump(2));
}

}  // namespace minke
