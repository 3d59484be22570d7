// What it costs an attention node to cross to the host for the experts, in every layer: segment graphs with
// the copies between them, beside the same work in one graph, and beside segments whose rows stay in GPU
// memory.
#pragma once

#include "bench/gpu/model_cases.h"

namespace minke::bench {

void RunCrossingCases(const ModelCalls& calls, const cuda::Stream& stream);

}  // namespace minke::bench
