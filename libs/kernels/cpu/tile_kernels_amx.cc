// AVX512-BF16 with the bf16 products done by AMX tiles.
#define MK_ISA_NAME "amx"
#define MK_ISA_TABLE k_tiles_amx
#define MK_LANES 16
#define MK_TILE_VECTORS 4
#include "libs/kernels/cpu/tile_kernels.inc"
