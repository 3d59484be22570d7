#include "services/gateway/openai/json_writer.h"

#include <charconv>
#include <cmath>

#include "libs/base/utf8.h"

namespace minke::gateway {
namespace {

void AppendEscaped(std::string_view text, std::string* out) {
  constexpr char kHex[] = "0123456789abcdef";
  size_t plain = 0;
  const auto flush = [&](size_t end, size_t next) {
    out->append(text.substr(plain, end - plain));
    plain = next;
  };
  for (size_t i = 0; i < text.size();) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte >= 0x80) {
      const Utf8Step step = NextUtf8(text.substr(i));
      if (step.kind != Utf8Kind::kCharacter) {
        flush(i, i + step.length);
        out->append(kReplacementCharacter);
      }
      i += step.length;
      continue;
    }
    if (byte >= 0x20 && byte != '"' && byte != '\\') {
      ++i;
      continue;
    }
    flush(i, i + 1);
    ++i;
    out->push_back('\\');
    switch (byte) {
      case '"':
        out->push_back('"');
        break;
      case '\\':
        out->push_back('\\');
        break;
      case '\n':
        out->push_back('n');
        break;
      case '\r':
        out->push_back('r');
        break;
      case '\t':
        out->push_back('t');
        break;
      default:
        out->append("u00");
        out->push_back(kHex[byte >> 4]);
        out->push_back(kHex[byte & 15]);
    }
  }
  flush(text.size(), text.size());
}

}  // namespace

void JsonWriter::Separate() {
  if (comma_) out_.push_back(',');
  comma_ = true;
}

JsonWriter& JsonWriter::Open(char bracket) {
  Separate();
  out_.push_back(bracket);
  comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::Close(char bracket) {
  out_.push_back(bracket);
  comma_ = true;
  return *this;
}

JsonWriter& JsonWriter::Raw(std::string_view text) {
  Separate();
  out_.append(text);
  return *this;
}

JsonWriter& JsonWriter::Key(std::string_view key) {
  String(key);
  out_.push_back(':');
  comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::String(std::string_view utf8) {
  Separate();
  out_.push_back('"');
  AppendEscaped(utf8, &out_);
  out_.push_back('"');
  return *this;
}

JsonWriter& JsonWriter::Int(int64_t value) {
  char buffer[24];
  return Raw({buffer, std::to_chars(buffer, buffer + sizeof(buffer), value).ptr});
}

JsonWriter& JsonWriter::Unsigned(uint64_t value) {
  char buffer[24];
  return Raw({buffer, std::to_chars(buffer, buffer + sizeof(buffer), value).ptr});
}

JsonWriter& JsonWriter::Float(float value) {
  if (std::isnan(value)) return Null();
  if (std::isinf(value)) return Raw(value < 0 ? "-9999" : "9999");
  char buffer[24];
  return Raw({buffer, std::to_chars(buffer, buffer + sizeof(buffer), value).ptr});
}

}  // namespace minke::gateway
