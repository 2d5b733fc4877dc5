// RMSNorm on the pool.
#pragma once

#include <cstddef>

#include "pool/pool.h"

namespace moespan {

// out [n, dim] = x / sqrt(mean(x^2) + eps) * weight, over each row of x [n, dim]; out may be x. A few rows run on the calling thread alone.
void rms_norm(Pool& pool, const float* x, const float* weight, float* out, size_t n, size_t dim, float eps);

// The norm of a product's input; no weight, no norm.
struct InputNorm {
    const float* weight;
    float eps;
};

// x [n, dim] normed, in memory of the pool that holds it until the next call of this function; x itself without a norm.
const float* normed(Pool& pool, const InputNorm& norm, const float* x, size_t n, size_t dim);

}  // namespace moespan
