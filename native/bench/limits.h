// What the pool's threads can reach on this machine at most: the roofs that the kernels are measured against.
#pragma once

#include <cstddef>

#include "pool/pool.h"

namespace moespan {

constexpr size_t kSweepChunk = size_t{1} << 20;  // bytes that a thread reads at once

// Seconds in which all threads together read data, `bytes` of it: a multiple of kSweepChunk.
double read_sweep(Pool& pool, const float* data, size_t bytes);

// Operations a second of all threads together in this loop of the pool's kernels (a multiplication and an addition are two).
double peak_rate(Pool& pool, const PeakLoop& loop);

}  // namespace moespan
