#include "layers/norm.h"

#include <algorithm>

#include "layers/spread.h"

namespace moespan {
namespace {

constexpr size_t kSmall = 32768;      // values that one thread normalises in about as long as a fork and a join take
constexpr size_t kChunkValues = 8192;  // values that a thread takes at once

}  // namespace

void rms_norm(Pool& pool, const float* x, const float* weight, float* out, size_t n, size_t dim, float eps) {
    const size_t rows = std::max<size_t>(1, kChunkValues / dim);
    spread(pool, (n + rows - 1) / rows, n * dim <= kSmall, [&](size_t i, uint8_t*) {
        const size_t first = i * rows;
        pool.kernels().rms_norm(x + first * dim, weight, out + first * dim, std::min(rows, n - first), dim, eps);
    });
}

const float* normed(Pool& pool, const InputNorm& norm, const float* x, size_t n, size_t dim) {
    if (norm.weight == nullptr) return x;
    auto* out = static_cast<float*>(pool.shared(Shared::kNormed, n * dim * sizeof(float)));
    rms_norm(pool, x, norm.weight, out, n, dim, norm.eps);
    return out;
}

}  // namespace moespan
