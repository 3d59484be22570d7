#define MK_ISA_NAME "avx2"
#define MK_ISA_TABLE k_tiles_avx2
#define MK_LANES 8
#define MK_TILE_VECTORS 2
#include "libs/kernels/cpu/tile_kernels.inc"
