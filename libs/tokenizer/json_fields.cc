#include "libs/tokenizer/json_fields.h"

#include <filesystem>
#include <fstream>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "libs/base/json_depth.h"
#include "libs/base/status.h"
#include "nlohmann/json.hpp"

namespace minke::tokenizer {

using nlohmann::json;

namespace {

// The published file is 4.6 MB; this only keeps a mistaken path from filling the memory.
constexpr uintmax_t kFileBytesMax = uintmax_t{512} << 20;

}  // namespace

std::string Brief(const json& value) {
  constexpr size_t kMax = 60;
  bool flat =
      value.size() <= 8;  // nested values are not written out: dump() recurses as deep as the file does
  if (value.is_structured()) {
    for (const json& element : value) flat = flat && !element.is_structured();
  }
  std::string text = flat ? value.dump(-1, ' ', true, json::error_handler_t::replace)
                          : absl::StrCat(value.is_array() ? "an array" : "an object", " of ", value.size());
  if (text.size() > kMax) text = absl::StrCat(text.substr(0, kMax), "...");
  return text;
}

absl::StatusOr<std::string> StringField(const json& object, const char* name, const std::string& where) {
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": expected an object, found ", Brief(object)));
  }
  const auto found = object.find(name);
  if (found == object.end() || !found->is_string()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ".", name, ": expected a string, found ",
                                                   found == object.end() ? "nothing" : Brief(*found)));
  }
  return found->get<std::string>();
}

absl::StatusOr<bool> BoolField(const json& object, const char* name, bool fallback,
                               const std::string& where) {
  const auto found = object.find(name);
  if (found == object.end() || found->is_null()) return fallback;
  if (!found->is_boolean()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ".", name, ": expected true or false, found ", Brief(*found)));
  }
  return found->get<bool>();
}

absl::StatusOr<uint32_t> TokenIdValue(const json& value, const std::string& where) {
  constexpr uint64_t kEnd = uint64_t{1} << 24;
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= kEnd) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": expected a token id from 0 to ", kEnd - 1, ", found ", Brief(value)));
  }
  return static_cast<uint32_t>(value.get<uint64_t>());
}

absl::StatusOr<json> ReadJsonFile(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return absl::NotFoundError(absl::StrCat(path, ": no such file"));
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.message()));
  if (size > kFileBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": expected at most ", kFileBytesMax, " bytes, found ", size));
  }
  std::ifstream file(path, std::ios::binary);
  std::string text(size, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  }
  if (NestsTooDeep(text)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": expected JSON of at most ", kJsonDepthMax, " levels of nesting, found more"));
  }
  try {
    return json::parse(text);
  } catch (const json::exception& parse_error) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected JSON: ", parse_error.what()));
  }
}

}  // namespace minke::tokenizer
