#define MK_ISA_NAME "portable"
#define MK_ISA_TABLE k_tiles_portable
#define MK_LANES 4
#define MK_TILE_VECTORS 2
#include "libs/kernels/cpu/tile_kernels.inc"
