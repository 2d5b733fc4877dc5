// RMSNorm on the pool.
#pragma once

#include <cstddef>

#include "pool/pool.h"

namespace moespan {

// out [n, dim] = x / sqrt(mean(x^2) + eps) * weight, over each row of x [n, dim]; out may be x. A few rows run on the calling thread alone.
void rms_norm(Pool& pool, const float* x, const float* weight, float* out, size_t n, size_t dim, float eps);

}  // namespace moespan
