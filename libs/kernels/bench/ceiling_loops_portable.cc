#define MK_CEILING_LOOPS k_ceiling_loops_portable
#define MK_LANES 4
#include "libs/kernels/bench/ceiling_loops.inc"
