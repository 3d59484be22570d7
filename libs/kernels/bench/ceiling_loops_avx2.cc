#define MK_CEILING_LOOPS k_ceiling_loops_avx2
#define MK_LANES 8
#include "libs/kernels/bench/ceiling_loops.inc"
