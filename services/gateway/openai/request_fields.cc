#include "services/gateway/openai/request_fields.h"

#include "libs/base/strings.h"

namespace minke::gateway {

using nlohmann::json;

std::string Describe(const json& value) {
  switch (value.type()) {
    case json::value_t::null:
      return "null";
    case json::value_t::boolean:
      return value.get<bool>() ? "true" : "false";
    case json::value_t::string:
      return "a string";
    case json::value_t::array:
      return "an array";
    case json::value_t::object:
      return "an object";
    default:
      return StrCat("the number ", value.dump());
  }
}

const json* RequestFields::Find(const char* name) const {
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void RequestFields::Number(const char* name, float* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_number()) return Expected(name, "a number", *value);
  *out = static_cast<float>(value->get<double>());
}

void RequestFields::Integer(const char* name, std::optional<int64_t>* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_number_integer()) return Expected(name, "an integer", *value);
  // Seeds use all 64 bits, signed or not; everything else is range-checked by its reader.
  *out = value->is_number_unsigned() ? static_cast<int64_t>(value->get<uint64_t>()) : value->get<int64_t>();
  if (value->is_number_unsigned() && **out < 0 && std::string_view(name) != "seed") {
    Expected(name, "a smaller integer", *value);
  }
}

void RequestFields::Bool(const char* name, bool* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_boolean()) return Expected(name, "true or false", *value);
  *out = value->get<bool>();
}

void RequestFields::String(const char* name, std::string* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_string()) return Expected(name, "a string", *value);
  *out = value->get<std::string>();
}

void RequestFields::TokenIdList(const char* name, uint32_t vocab_size, TokenIds* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (const auto problem = ReadTokenIds(*value, vocab_size, out)) Fail(name, *problem);
}

void RequestFields::Fail(std::string_view param, std::string_view message) {
  if (!error_) error_ = BadField(param, message);
}

void RequestFields::Expected(const char* name, std::string_view expected, const json& found) {
  Fail(name, StrCat(name, ": expected ", expected, ", found ", Describe(found)));
}

std::optional<std::string> ReadTokenIds(const json& value, uint32_t vocab_size, TokenIds* out) {
  if (!value.is_array()) return StrCat("expected an array of token ids, found ", Describe(value));
  out->reserve(value.size());
  for (size_t i = 0; i < value.size(); ++i) {
    const json& id = value[i];
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= vocab_size) {
      return StrCat("expected token ids from 0 to ", vocab_size - 1, ", found ", Describe(id), " at index ",
                    i);
    }
    out->push_back(static_cast<uint32_t>(id.get<uint64_t>()));
  }
  return std::nullopt;
}

}  // namespace minke::gateway
