// The gated feed-forward network of one dense layer, or of one expert.
#pragma once

#include "layers/linear.h"

namespace moespan {

// out [n, down.rows] (+)= (silu(x @ gate^T) * (x @ up^T)) @ down^T, x [n, gate.cols] (SwiGLU; Shazeer 2020). gate and up have one shape,
// and down.cols == gate.rows. out must not overlap x (linear and ffn may be handed normed(x), which is elsewhere).
void ffn(Pool& pool, const Matrix& gate, const Matrix& up, const Matrix& down, const float* x, size_t n, float* out, bool accumulate);

}  // namespace moespan
