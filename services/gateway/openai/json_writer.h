// Appends JSON to a string: what a stream sends per token is written without building a document first.
// Floats are the shortest decimals that read back as the same f32. Thread-compatible.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace minke::gateway {

class JsonWriter {
 public:
  // Appends to `out`, which is borrowed.
  explicit JsonWriter(std::string* out) : out_(*out) {}

  JsonWriter& BeginObject() { return Open('{'); }
  JsonWriter& EndObject() { return Close('}'); }
  JsonWriter& BeginArray() { return Open('['); }
  JsonWriter& EndArray() { return Close(']'); }
  JsonWriter& Key(std::string_view key);
  JsonWriter& String(std::string_view utf8);  // bytes that are not UTF-8 become U+FFFD
  JsonWriter& Int(int64_t value);
  JsonWriter& Unsigned(uint64_t value);
  JsonWriter& Float(float value);  // -inf: -9999, as OpenAI does; NaN: null
  JsonWriter& Bool(bool value) { return Raw(value ? "true" : "false"); }
  JsonWriter& Null() { return Raw("null"); }

 private:
  JsonWriter& Open(char bracket);
  JsonWriter& Close(char bracket);
  JsonWriter& Raw(std::string_view text);
  void Separate();

  std::string& out_;
  bool comma_ = false;  // a value precedes the next one
};

}  // namespace minke::gateway
