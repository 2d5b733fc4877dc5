// Rotary position embedding on the pool.
#pragma once

#include <cstddef>

#include "pool/pool.h"

namespace moespan {

// Rotates the first rot_dim values of each head of x [n, heads, head_dim] in place; table [n, rot_dim / 2, 2] holds (cos, sin).
// interleaved: pairs (2i, 2i + 1); otherwise (i, i + rot_dim / 2). A few tokens run on the calling thread alone.
void rope(Pool& pool, float* x, size_t n, size_t heads, size_t head_dim, size_t rot_dim, const float* table, bool interleaved);

}  // namespace moespan
