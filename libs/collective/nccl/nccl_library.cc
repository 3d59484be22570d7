#include "libs/collective/nccl/nccl_library.h"

#include <dlfcn.h>

#include <string>

#include "libs/base/strings.h"

namespace minke {
namespace {

constexpr const char* kPlaces[] = {"libnccl.so.2", "/usr/local/cuda/lib64/libnccl.so.2"};

absl::StatusOr<NcclLibrary> Load() {
  void* handle = nullptr;
  std::string reasons;
  for (const char* place : kPlaces) {
    handle = dlopen(place, RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) break;
    reasons += StrCat("; ", dlerror());  // it names the place
  }
  if (handle == nullptr) return absl::FailedPreconditionError(StrCat("NCCL cannot be loaded", reasons));
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
    if (function == nullptr) missing = name;
  };
  NcclLibrary library = {};
  find(library.GetErrorString, "ncclGetErrorString");
  find(library.GetUniqueId, "ncclGetUniqueId");
  find(library.CommInitRankConfig, "ncclCommInitRankConfig");
  find(library.CommGetAsyncError, "ncclCommGetAsyncError");
  find(library.CommFinalize, "ncclCommFinalize");
  find(library.CommDestroy, "ncclCommDestroy");
  find(library.CommAbort, "ncclCommAbort");
  find(library.AllReduce, "ncclAllReduce");
  find(library.Broadcast, "ncclBroadcast");
  if (missing != nullptr) {
    return absl::FailedPreconditionError(StrCat("NCCL: libnccl.so.2 is too old, it has no ", missing));
  }
  return library;
}

}  // namespace

absl::StatusOr<const NcclLibrary*> NcclLibrary::Get() {
  static const absl::StatusOr<NcclLibrary> library = Load();
  if (!library.ok()) return library.status();
  return &*library;
}

}  // namespace minke
