# Writes the console's files as C++: cmake -DDIST=folder -DOUT=file.cc -P embed.cmake
# index.html is served at "/", every other file at "/console/NAME".
file(GLOB files RELATIVE ${DIST} ${DIST}/*)
list(SORT files)
set(arrays "")
set(table "")
set(number 0)
foreach(name ${files})
  if(name MATCHES "\\.html$")
    set(type "text/html; charset=utf-8")
  elseif(name MATCHES "\\.js$")
    set(type "text/javascript; charset=utf-8")
  elseif(name MATCHES "\\.css$")
    set(type "text/css; charset=utf-8")
  elseif(name MATCHES "\\.svg$")
    set(type "image/svg+xml")
  else()
    message(FATAL_ERROR "${DIST}/${name}: expected .html, .js, .css or .svg")
  endif()
  if(name STREQUAL "index.html")
    set(path "/")
  else()
    set(path "/console/${name}")
  endif()
  file(READ ${DIST}/${name} hex HEX)
  file(SHA256 ${DIST}/${name} hash)
  string(SUBSTRING ${hash} 0 16 etag)
  string(REGEX REPLACE "(..)" "0x\\1," bytes "${hex}")
  string(APPEND arrays "constexpr unsigned char kFile${number}[] = {${bytes}};\n")
  string(APPEND table "    {\"${path}\", \"${type}\", {reinterpret_cast<const char*>(kFile${number}), sizeof kFile${number}}, \"\\\"${etag}\\\"\"},\n")
  math(EXPR number "${number} + 1")
endforeach()
file(WRITE ${OUT} "// Made by services/gateway/console/embed.cmake.
#include \"services/gateway/console/assets.h\"

namespace minke::gateway {
namespace {

${arrays}
const Asset kAssets[] = {
${table}};

}  // namespace

std::span<const Asset> Assets() { return kAssets; }

}  // namespace minke::gateway
")
