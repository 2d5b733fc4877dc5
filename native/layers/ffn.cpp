#include "layers/ffn.h"

#include <algorithm>

#include "layers/product.h"

namespace moespan {

void ffn(Pool& pool, const Matrix& gate, const Matrix& up, const Matrix& down, const float* x, size_t n, float* out, bool accumulate) {
    // gate and up are cut alike, at multiples of 32, so that the thread that computed a chunk of both can apply the gate and round the
    // chunk to int8 for `down` while it is in its cache.
    const size_t width = gate.rows;
    const Product gates(pool, gate, n, 32), downs(pool, down, n);
    Product ups(pool, up, n, 32);
    ups.cut_like(gates);
    const bool quantised = !(gates.float_input() && ups.float_input());
    auto* gated = static_cast<float*>(pool.shared(1, n * width * sizeof(float)));
    auto* upped = static_cast<float*>(pool.shared(2, n * width * sizeof(float)));
    const Activations input(pool, 0, x, n, gate.cols, quantised);
    const Activations hidden(pool, 3, gated, n, width, !downs.float_input());
    pool.reserve_scratch(std::max({gates.scratch_bytes(), ups.scratch_bytes(), downs.scratch_bytes()}));

    pool.run([&](Worker& worker) {
        if (quantised) {
            worker.each(n, [&](size_t t) { input.quantize(t, 0, gate.cols); });
            worker.barrier();
        }
        worker.each(gates.chunks(), [&](size_t chunk) {
            const size_t first = gates.begin(chunk), last = gates.end(chunk);
            gates.compute(chunk, input.tokens(), gated, false, worker.scratch());
            ups.compute(chunk, input.tokens(), upped, false, worker.scratch());
            for (size_t t = 0; t < n; ++t) {
                float* values = gated + t * width + first;
                pool.kernels().silu_mul(values, upped + t * width + first, values, last - first);
                hidden.quantize(t, first, last);
            }
        });
        worker.barrier();
        worker.each(downs.chunks(), [&](size_t chunk) { downs.compute(chunk, hidden.tokens(), out, accumulate, worker.scratch()); });
    });
}

}  // namespace moespan
