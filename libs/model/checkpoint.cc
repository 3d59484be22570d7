#include "libs/model/checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_join.h"
#include "libs/base/dtype.h"
#include "libs/base/hash.h"
#include "libs/base/json_depth.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"

namespace minke {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kHeaderBytesMax = 256ull << 20;  // V2's 29,102 tensors need 4 MB

std::string ShapeText(std::span<const int64_t> shape) { return StrCat("[", absl::StrJoin(shape, ", "), "]"); }

absl::Status Bad(std::string_view file, std::string_view what, std::string_view expected,
                 std::string_view found) {
  return absl::InvalidArgumentError(StrCat(file, ": ", what, ": expected ", expected, ", found ", found));
}

std::string Shorten(std::string text) { return text.size() <= 80 ? text : text.substr(0, 80) + "..."; }

std::string Dump(const Json& json) {
  return Shorten(json.dump(-1, ' ', false, Json::error_handler_t::replace));
}

// One entry of a safetensors header, checked against the size of the data area.
absl::StatusOr<TensorView> ReadEntry(const std::string& path, const std::string& name, const Json& entry,
                                     const std::byte* data, uint64_t data_bytes) {
  const std::string tensor = StrCat("tensor ", Shorten(name));
  if (!entry.is_object()) return Bad(path, tensor, "an object", Dump(entry));
  const Json dtype = entry.value("dtype", Json()), shape = entry.value("shape", Json()),
             offsets = entry.value("data_offsets", Json());
  TensorView view;
  if (dtype == "BF16") {
    view.dtype = DType::kBF16;
  } else if (dtype == "F16") {
    view.dtype = DType::kF16;
  } else if (dtype == "F32") {
    view.dtype = DType::kF32;
  } else {
    return Bad(path, tensor, "dtype BF16, F16 or F32", Dump(dtype));
  }
  if (!shape.is_array() || shape.size() > 8)
    return Bad(path, tensor, "a shape of at most 8 dimensions", Dump(shape));
  uint64_t bytes = DTypeBytes(view.dtype);
  for (const Json& dimension : shape) {
    if (!dimension.is_number_unsigned())
      return Bad(path, tensor, "dimensions that are whole numbers", Dump(shape));
    const uint64_t value = dimension.get<uint64_t>();
    if (value > (uint64_t{1} << 40) || __builtin_mul_overflow(bytes, value, &bytes)) {
      return Bad(path, tensor, "a shape that fits the file", Dump(shape));
    }
    view.shape.push_back(static_cast<int64_t>(value));
  }
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return Bad(path, tensor, "data_offsets [begin, end]", Dump(offsets));
  }
  const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
  if (begin > end || end > data_bytes) {
    return Bad(path, tensor, StrCat("data_offsets inside the file's ", data_bytes, " data bytes"),
               Dump(offsets));
  }
  if (end - begin != bytes) {
    return Bad(path, tensor,
               StrCat(bytes, " bytes for shape ", ShapeText(view.shape), " ", ToString(view.dtype)),
               StrCat(end - begin));
  }
  view.data = data + begin;
  return view;
}

}  // namespace

std::string_view ToString(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kF32:
      return "F32";
  }
  return "?";
}

int64_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

int64_t TensorView::elements() const {
  int64_t n = 1;
  for (const int64_t dimension : shape) n *= dimension;
  return n;
}

void TensorView::Read(int64_t begin, std::span<float> out) const {
  MK_CHECK(begin >= 0 && begin + static_cast<int64_t>(out.size()) <= elements());
  // Tensors need not be aligned in a file, so elements are copied out byte by byte.
  const std::byte* from = data + begin * DTypeBytes(dtype);
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out.data(), from, out.size_bytes());
      return;
    case DType::kBF16:
      for (size_t i = 0; i < out.size(); ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, 2);
        out[i] = BF16ToF32(bits);
      }
      return;
    case DType::kF16:
      for (size_t i = 0; i < out.size(); ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, 2);
        out[i] = F16ToF32(bits);
      }
      return;
  }
}

absl::Status Checkpoint::AddFile(const std::string& path, const std::vector<std::string>* expected_names) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return absl::NotFoundError(StrCat(path, ": expected a readable file, found: ", std::strerror(errno)));
  const absl::Cleanup close_fd = [fd] { ::close(fd); };
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
    return Bad(path, "file", "a regular file", "something else");
  const uint64_t file_bytes = static_cast<uint64_t>(info.st_size);
  if (file_bytes < 8) return Bad(path, "file", "at least 8 bytes", StrCat(file_bytes));
  void* mapped = ::mmap(nullptr, file_bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED)
    return absl::ResourceExhaustedError(StrCat(path, ": mmap: ", std::strerror(errno)));
  const auto* bytes = static_cast<const std::byte*>(mapped);
  files_.push_back({path, bytes, file_bytes});

  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes, 8);
  if (header_bytes > std::min(kHeaderBytesMax, file_bytes - 8)) {
    return Bad(path, "header",
               StrCat("at most ", std::min(kHeaderBytesMax, file_bytes - 8), " bytes (file truncated?)"),
               StrCat(header_bytes));
  }
  const char* text = reinterpret_cast<const char*>(bytes) + 8;
  if (NestsTooDeep({text, header_bytes}))
    return Bad(path, "header", StrCat("at most ", kJsonDepthMax, " levels of nesting"), "more");
  const Json header = Json::parse(text, text + header_bytes, nullptr, /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object())
    return Bad(path, "header", "a JSON object", "something else");
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    absl::StatusOr<TensorView> view =
        ReadEntry(path, name, entry, bytes + 8 + header_bytes, file_bytes - 8 - header_bytes);
    if (!view.ok()) return view.status();
    if (!tensors_.emplace(name, *std::move(view)).second) {
      return Bad(path, StrCat("tensor ", name), "each tensor once", "it in two files");
    }
    file_of_tensor_[name] = files_.size() - 1;
  }
  if (expected_names != nullptr) {
    for (const std::string& name : *expected_names) {
      if (!header.contains(name))
        return Bad(path, StrCat("tensor ", name), "it here, as the index says", "nothing");
    }
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::AddIndex(const std::string& index_path) {
  std::ifstream file(index_path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  if (NestsTooDeep(text.str()))
    return Bad(index_path, "index", StrCat("at most ", kJsonDepthMax, " levels of nesting"), "more");
  const Json index = Json::parse(text.str(), nullptr, /*allow_exceptions=*/false);
  if (index.is_discarded() || !index.is_object() || !index.contains("weight_map") ||
      !index["weight_map"].is_object()) {
    return Bad(index_path, "index", "a JSON object with a weight_map", "something else");
  }
  std::map<std::string, std::vector<std::string>> names_of_file;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    if (!shard.is_string() || shard.get<std::string>().find('/') != std::string::npos) {
      return Bad(index_path, StrCat("tensor ", Shorten(name)), "a file name", Dump(shard));
    }
    names_of_file[shard.get<std::string>()].push_back(name);
  }
  for (const auto& [shard, names] : names_of_file)
    MK_RETURN_IF_ERROR(AddFile(directory_ + "/" + shard, &names));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::OpenUnchecked(const std::string& directory) {
  MK_ASSIGN_OR_RETURN(ModelConfig config, ModelConfig::Load(directory));
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->directory_ = directory;
  checkpoint->config_ = std::move(config);
  const std::string index = directory + "/model.safetensors.index.json";
  if (::access(index.c_str(), R_OK) == 0) {
    MK_RETURN_IF_ERROR(checkpoint->AddIndex(index));
  } else {
    MK_RETURN_IF_ERROR(checkpoint->AddFile(directory + "/model.safetensors", nullptr));
  }
  uint64_t hash = checkpoint->config_.Hash();
  for (const auto& [name, view] : checkpoint->tensors_) {
    const MappedFile& file = checkpoint->files_[checkpoint->file_of_tensor_[name]];
    hash = Fnv1a(StrCat(name, ShapeText(view.shape), ToString(view.dtype), view.data - file.data), hash);
  }
  // A few values too, so that two trainings of one shape differ: norms are small and every process may read
  // them.
  if (auto norm = checkpoint->tensors_.find("model.norm.weight"); norm != checkpoint->tensors_.end()) {
    hash = Fnv1a(
        {reinterpret_cast<const char*>(norm->second.data), static_cast<size_t>(norm->second.bytes())}, hash);
  }
  checkpoint->fingerprint_ = hash;
  return checkpoint;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& directory) {
  absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = OpenUnchecked(directory);
  if (!checkpoint.ok()) return checkpoint;
  const std::vector<std::string> problems = (*checkpoint)->Problems();
  if (problems.empty()) return checkpoint;
  const std::string more = problems.size() == 1 ? "" : StrCat(" (and ", problems.size() - 1, " more)");
  return absl::InvalidArgumentError(StrCat(problems.front(), more));
}

std::vector<std::string> Checkpoint::Problems() const {
  std::vector<std::string> problems;
  for (const TensorSpec& spec : ExpectedTensors(config_)) {
    if (absl::Status status = Find(spec.name, spec.shape).status(); !status.ok()) {
      problems.emplace_back(status.message());
    }
  }
  return problems;
}

absl::StatusOr<TensorView> Checkpoint::Find(const std::string& name, std::span<const int64_t> shape) const {
  auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    return absl::NotFoundError(
        StrCat(directory_, ": tensor ", name, ": expected shape ", ShapeText(shape), ", found nothing"));
  }
  if (!std::equal(shape.begin(), shape.end(), it->second.shape.begin(), it->second.shape.end())) {
    return Bad(files_[file_of_tensor_.at(name)].path, StrCat("tensor ", name),
               StrCat("shape ", ShapeText(shape)), ShapeText(it->second.shape));
  }
  return it->second;
}

void Checkpoint::Release(const TensorView& tensor) const {
  // Whole pages inside the tensor only: its neighbours may be in use.
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data) + tensor.bytes()) & ~(kPage - 1);
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

Checkpoint::~Checkpoint() {
  for (const MappedFile& file : files_) ::munmap(const_cast<std::byte*>(file.data), file.bytes);
}

}  // namespace minke
