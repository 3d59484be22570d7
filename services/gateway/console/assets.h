// The console's files, embedded when the gateway was built (services/gateway/console/dist).
#pragma once

#include <span>
#include <string_view>

namespace minke::gateway {

struct Asset {
  std::string_view path;  // of the URL: "/", "/console/app.js"
  std::string_view content_type;
  std::string_view bytes;
  std::string_view etag;  // of the bytes, in quotes
};

std::span<const Asset> Assets();

}  // namespace minke::gateway
