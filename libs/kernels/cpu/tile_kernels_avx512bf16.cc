#define MK_ISA_NAME "avx512bf16"
#define MK_ISA_TABLE k_tiles_avx512bf16
#define MK_LANES 16
#define MK_TILE_VECTORS 4
#include "libs/kernels/cpu/tile_kernels.inc"
