#define MK_CEILING_LOOPS k_ceiling_loops_amx
#define MK_LANES 16
#include "libs/kernels/bench/ceiling_loops.inc"
