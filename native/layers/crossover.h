// From how many tokens a product goes through panels (gemm) and no longer straight from the strips (gemv): measured, since it differs between types and
// between CPUs. Both give the same bits, so that what the stopwatch says changes no answer. (Where bf16 begins does, and so it is fixed.)
#pragma once

#include "pool/pool.h"

namespace moespan {

// Measures it for one type in tile order, in some milliseconds on the calling thread, unless the pool knows it already; does nothing for a type without.
void measure_crossover(Pool& pool, uint32_t type_id);

}  // namespace moespan
