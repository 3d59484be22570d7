// What the fuzz targets share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>

// A property of the parser that does not hold ends the run, and libFuzzer keeps the input.
#define FUZZ_ASSERT(condition)                                                           \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

namespace minke::fuzz {

// Takes values off the front of an input; zeros once it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t bytes) : rest_(reinterpret_cast<const char*>(data), bytes) {}

  template <typename T>
  T Take() {
    T value{};
    const size_t bytes = std::min(sizeof(T), rest_.size());
    if (bytes > 0) std::memcpy(&value, rest_.data(), bytes);
    rest_.remove_prefix(bytes);
    return value;
  }
  // Up to, and without, the next `separator`; what is left if there is none.
  std::string_view TakeUntil(std::string_view separator) {
    const size_t end = rest_.find(separator);
    const std::string_view taken = rest_.substr(0, end);
    rest_.remove_prefix(end == std::string_view::npos ? rest_.size() : end + separator.size());
    return taken;
  }
  std::string_view TakeBytes(size_t bytes) {
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  std::string_view rest() const { return rest_; }
  bool empty() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

// Separates the parts of inputs that stand for several files or messages: readable in a corpus, and a
// dictionary entry.
inline constexpr std::string_view kPart = "\n--part--\n";

// A folder in memory for parsers that read files; one per process, removed at its end.
class Folder {
 public:
  Folder() {
    std::string pattern =
        std::filesystem::exists("/dev/shm") ? "/dev/shm/minke-fuzz-XXXXXX" : "/tmp/minke-fuzz-XXXXXX";
    FUZZ_ASSERT(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  // Replaces the file; no text at all removes it.
  void Write(const std::string& name, std::string_view text) const {
    const std::string path = path_ + "/" + name;
    if (text.data() == nullptr) {
      std::remove(path.c_str());
      return;
    }
    std::FILE* file = std::fopen(path.c_str(), "wb");
    FUZZ_ASSERT(file != nullptr);
    FUZZ_ASSERT(std::fwrite(text.data(), 1, text.size(), file) == text.size());
    std::fclose(file);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Whether it is UTF-8, by the letter of RFC 3629.
inline bool IsUtf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t at) { return static_cast<unsigned char>(text[at]); };
    const unsigned char first = byte(i);
    const size_t more = first < 0x80   ? 0
                        : first < 0xc2 ? 9
                        : first < 0xe0 ? 1
                        : first < 0xf0 ? 2
                        : first < 0xf5 ? 3
                                       : 9;
    if (more == 9 || i + more >= text.size()) return false;
    for (size_t j = 1; j <= more; ++j) {
      if ((byte(i + j) & 0xc0) != 0x80) return false;
    }
    if (first == 0xe0 && byte(i + 1) < 0xa0) return false;
    if (first == 0xed && byte(i + 1) > 0x9f) return false;
    if (first == 0xf0 && byte(i + 1) < 0x90) return false;
    if (first == 0xf4 && byte(i + 1) > 0x8f) return false;
    i += more + 1;
  }
  return true;
}

}  // namespace minke::fuzz
