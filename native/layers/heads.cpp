#include "layers/heads.h"

#include <algorithm>

#include "layers/product.h"

namespace moespan {
namespace {

constexpr size_t kRowsAtOnce = 16;  // of the input that a thread rounds, or copies

}  // namespace

void linear_heads(Pool& pool, const Matrix& matrix, const HeadRows<const float>& x, size_t n, const HeadRows<float>& out) {
    const size_t heads = matrix.count, threads = static_cast<size_t>(pool.threads());
    const Product product(pool.kernels(), matrix);
    const Chunks chunks = product.cut(n, ceil_div(threads, heads));
    const Activations input(pool, Shared::kInput, heads * n, matrix.cols, readers(product));  // of a head, all tokens one behind the other
    pool.reserve_scratch(product.scratch_bytes(n, chunks.chunk_rows));

    pool.each(ceil_div(n * heads, kRowsAtOnce), [&](size_t i, uint8_t*) {
        for (size_t row = i * kRowsAtOnce; row < std::min(n * heads, (i + 1) * kRowsAtOnce); ++row) {
            const size_t token = row / heads, head = row % heads;
            input.put(head * n + token, 0, x.row(token, head), matrix.cols);
        }
    });
    pool.each(heads * chunks.count(), [&](size_t i, uint8_t* scratch) {
        const size_t head = i / chunks.count(), first = chunks.begin(i % chunks.count()), last = chunks.end(i % chunks.count());
        product.compute(head, first, last, input.rows(head * n, n), {out.row(0, head) + first, out.token_stride, false}, scratch);
    });
}

}  // namespace moespan
