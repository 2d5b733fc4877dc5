#include "layers/linear.h"

#include <algorithm>
#include <array>
#include <optional>

#include "layers/product.h"

namespace moespan {

void linear(Pool& pool, const Matrix* matrices, size_t count, const float* x, size_t n, float* const* outs, bool accumulate) {
    std::array<std::optional<Product>, kMaxMatrices> products;
    size_t chunks = 0, scratch = 0;
    bool quantised = false;
    for (size_t i = 0; i < count; ++i) {
        const Product& product = products[i].emplace(pool, matrices[i], n);
        chunks += product.chunks();
        scratch = std::max(scratch, product.scratch_bytes());
        quantised |= !product.float_input();
    }
    const size_t cols = matrices[0].cols;
    const Activations input(pool, 0, x, n, cols, quantised);
    pool.reserve_scratch(scratch);

    pool.run([&](Worker& worker) {
        if (quantised) {
            worker.each(n, [&](size_t t) { input.quantize(t, 0, cols); });
            worker.barrier();
        }
        worker.each(chunks, [&](size_t chunk) {
            size_t i = 0;
            for (; chunk >= products[i]->chunks(); ++i) chunk -= products[i]->chunks();
            products[i]->compute(chunk, input.tokens(), outs[i], accumulate, worker.scratch());
        });
    });
}

void dequantize_rows(Pool& pool, const Matrix& matrix, const int64_t* row_ids, size_t n, float* out) {
    const FormatKernels& format = format_of(pool.kernels(), matrix);
    pool.run([&](Worker& worker) {
        worker.each(n, [&](size_t i) { format.dequantize(matrix.data + row_ids[i] * matrix.row_bytes, matrix.cols, out + i * matrix.cols); });
    });
}

}  // namespace moespan
