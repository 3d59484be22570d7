#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

#include "libs/base/status.h"
#include "libs/kernels/cpu/tile_kernels.h"

namespace minke::kernels {

extern const TileKernels k_tiles_portable, k_tiles_avx2, k_tiles_avx512, k_tiles_avx512bf16, k_tiles_amx;

namespace {

// The kernel gives tile registers (8 KiB per thread) only to processes that ask for them.
bool AmxGranted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "";
}

bool IsaSupported(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmx:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && AmxGranted();
  }
  return false;
}

const TileKernels& TileKernelsFor(Isa isa) {
  MK_CHECK(IsaSupported(isa));
  switch (isa) {
    case Isa::kPortable:
      return k_tiles_portable;
    case Isa::kAvx2:
      return k_tiles_avx2;
    case Isa::kAvx512:
      return k_tiles_avx512;
    case Isa::kAvx512Bf16:
      return k_tiles_avx512bf16;
    case Isa::kAmx:
      return k_tiles_amx;
  }
  return k_tiles_portable;
}

const TileKernels& Tiles() {
  static const TileKernels& chosen = [&]() -> const TileKernels& {
    const char* wish = std::getenv("MINKE_ISA");
    for (const Isa isa : kIsas) {
      if (!IsaSupported(isa)) continue;
      const TileKernels& tiles = TileKernelsFor(isa);
      if (wish == nullptr || std::string_view(wish) == tiles.name) return tiles;
    }
    return k_tiles_portable;
  }();
  return chosen;
}

}  // namespace minke::kernels
