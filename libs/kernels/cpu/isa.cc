#include <cstdlib>
#include <string_view>

#include "libs/base/status.h"
#include "libs/kernels/cpu/tile_kernels.h"

namespace minke::kernels {

extern const TileKernels k_tiles_portable, k_tiles_avx2, k_tiles_avx512, k_tiles_avx512bf16;

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
  }
  return k_tiles_portable;
}

const TileKernels& Tiles() {
  static const TileKernels& chosen = [&]() -> const TileKernels& {
    const char* wish = std::getenv("MINKE_ISA");
    for (const Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2}) {
      if (!IsaSupported(isa)) continue;
      const TileKernels& tiles = TileKernelsFor(isa);
      if (wish == nullptr || std::string_view(wish) == tiles.name) return tiles;
    }
    return k_tiles_portable;
  }();
  return chosen;
}

}  // namespace minke::kernels
