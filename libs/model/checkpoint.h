// A published DeepSeek-V2 checkpoint: config.json and model.safetensors, or shards named by
// model.safetensors.index.json. Files are memory-mapped, so a process touches only the bytes of the tensors
// it asks for. Every header, offset, dtype and shape is checked before a tensor is handed out. Format:
// docs/checkpoints.md. Thread-safe after Open.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/model/config.h"
#include "libs/model/tensors.h"

namespace minke {

enum class DType : uint8_t { kBF16, kF16, kF32 };
std::string_view ToString(DType dtype);
int64_t DTypeBytes(DType dtype);

// A row-major tensor inside a mapped file; lives as long as its Checkpoint.
struct TensorView {
  const std::byte* data = nullptr;
  DType dtype{};
  std::vector<int64_t> shape;
  int64_t elements() const;
  int64_t bytes() const { return elements() * DTypeBytes(dtype); }
  // Widens elements [begin, begin + out.size()) exactly to f32.
  void Read(int64_t begin, std::span<float> out) const;
};

class Checkpoint {
 public:
  // Opens and checks everything but the values: headers, offsets, and that every tensor of the configuration
  // is there with its shape and a supported dtype. Errors name directory or file, tensor, expected and found.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& directory);
  // The same without the check against the configuration: for `minke checkpoint inspect`.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> OpenUnchecked(const std::string& directory);
  ~Checkpoint();

  const std::string& directory() const { return directory_; }
  const ModelConfig& config() const { return config_; }
  // One error per missing or misshapen tensor.
  std::vector<std::string> Problems() const;
  int64_t file_count() const { return static_cast<int64_t>(files_.size()); }

  // NOT_FOUND or INVALID_ARGUMENT unless the tensor exists with exactly this shape.
  absl::StatusOr<TensorView> Find(const std::string& name, std::span<const int64_t> shape) const;
  // Names, dtypes and shapes of everything in the files.
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }

  // Tells the system that a tensor's bytes are no longer needed here (they stay in the page cache).
  void Release(const TensorView& tensor) const;

  // Hash of the configuration and of every tensor's name, dtype, shape and place. Equal for copies of one
  // checkpoint; nodes that disagree refuse each other.
  uint64_t fingerprint() const { return fingerprint_; }

 private:
  struct MappedFile {
    std::string path;
    const std::byte* data = nullptr;
    size_t bytes = 0;
  };
  Checkpoint() = default;
  absl::Status AddFile(const std::string& path, const std::vector<std::string>* expected_names);
  absl::Status AddIndex(const std::string& index_path);

  std::string directory_;
  ModelConfig config_;
  std::vector<MappedFile> files_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, size_t> file_of_tensor_;
  uint64_t fingerprint_ = 0;
};

}  // namespace minke
