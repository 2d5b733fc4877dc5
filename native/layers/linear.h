// Weight matrices times activations, on the pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool/pool.h"

namespace moespan {

// A weight matrix [rows, cols], in row order (GGUF blocks, row-major) or in tile order (strips of kStripRows rows, kernels/tiles-inl.h); or `count`
// of them one behind the other, for experts and heads. It owns nothing; cols is a multiple of the type's block.
struct Matrix {
    uint32_t type_id;
    size_t rows, cols;
    size_t row_bytes;  // of a row, or of a strip where in_tiles
    const uint8_t* data;
    size_t count = 1;
    bool in_tiles = false;

    size_t bytes() const { return row_bytes * (in_tiles ? (rows + kStripRows - 1) / kStripRows : rows); }  // of one of them
};

constexpr size_t kMaxMatrices = 8;  // that one call of linear takes

// outs[i] [n, matrices[i].rows] (+)= x [n, cols] @ matrices[i]^T for `count` matrices that share cols. x is quantised once.
void linear(Pool& pool, const Matrix* matrices, size_t count, const float* x, size_t n, float* const* outs, bool accumulate);

// out [n, cols] = the row, n times: what a product with a bias is added to.
void repeat_row(const float* row, size_t cols, float* out, size_t n);

// out [n, cols] = the rows row_ids [n] of a matrix in row order; every id is below matrix.rows.
void dequantize_rows(Pool& pool, const Matrix& matrix, const int64_t* row_ids, size_t n, float* out);

}  // namespace moespan
