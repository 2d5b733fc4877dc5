// A weight matrix of its own for each attention head, on the pool.
#pragma once

#include <cstddef>

#include "layers/linear.h"
#include "pool/pool.h"

namespace moespan {

// [n, heads, at least cols] floats inside a larger array: the distances between tokens and between heads.
template <class T>
struct HeadRows {
    T* data;
    size_t token_stride, head_stride;

    T* row(size_t token, size_t head) const { return data + token * token_stride + head * head_stride; }
};

// out[t, h, : rows] = matrix h @ x[t, h, : cols] for each head h of the matrix.count heads. x and out do not overlap.
void linear_heads(Pool& pool, const Matrix& matrix, const HeadRows<const float>& x, size_t n, const HeadRows<float>& out);

}  // namespace moespan
