#include "layers/linear.h"

#include <algorithm>
#include <array>
#include <optional>

#include "layers/product.h"

namespace moespan {

void linear(Pool& pool, const Matrix* matrices, size_t count, const float* x, size_t n, float* const* outs, bool accumulate) {
    std::array<std::optional<Product>, kMaxMatrices> products;
    std::array<Chunks, kMaxMatrices> cuts;
    size_t pieces = 0, scratch = 0;
    Readers all{};
    for (size_t i = 0; i < count; ++i) {
        const Product& product = products[i].emplace(pool.kernels(), matrices[i]);
        cuts[i] = product.cut(n, static_cast<size_t>(pool.threads()));
        pieces += cuts[i].count();
        scratch = std::max(scratch, product.scratch_bytes(n, cuts[i].chunk_rows));
        all.codes |= !product.float_input();
    }
    const size_t cols = matrices[0].cols;
    const Activations input(pool, Shared::kInput, n, cols, all, x);
    pool.reserve_scratch(scratch);

    if (input.to_fill()) pool.each(n, [&](size_t t, uint8_t*) { input.put(t, 0, x + t * cols, cols); });
    pool.each(pieces, [&](size_t piece, uint8_t* own) {
        size_t i = 0;
        for (; piece >= cuts[i].count(); ++i) piece -= cuts[i].count();
        const size_t first = cuts[i].begin(piece), rows = matrices[i].rows;
        products[i]->compute(0, first, cuts[i].end(piece), input.rows(0, n), {outs[i] + first, rows, accumulate}, own);
    });
}

void dequantize_rows(Pool& pool, const Matrix& matrix, const int64_t* row_ids, size_t n, float* out) {
    const FormatKernels& format = format_of(pool.kernels(), matrix);
    pool.each(n, [&](size_t i, uint8_t*) { format.dequantize(matrix.data + row_ids[i] * matrix.row_bytes, matrix.cols, out + i * matrix.cols); });
}

}  // namespace moespan
