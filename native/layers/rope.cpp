#include "layers/rope.h"

#include <algorithm>

#include "layers/spread.h"

namespace moespan {
namespace {

constexpr size_t kSmall = 32768;      // values that one thread rotates in about as long as a fork and a join take
constexpr size_t kChunkValues = 8192;  // values that a thread takes at once

}  // namespace

void rope(Pool& pool, float* x, size_t n, size_t heads, size_t head_dim, size_t rot_dim, const float* table, bool interleaved) {
    const size_t width = heads * head_dim, tokens = std::max<size_t>(1, kChunkValues / width);
    spread(pool, (n + tokens - 1) / tokens, n * width <= kSmall, [&](size_t i, uint8_t*) {
        const size_t first = i * tokens;
        pool.kernels().rope(x + first * width, std::min(tokens, n - first), heads, head_dim, rot_dim, table + first * rot_dim, interleaved);
    });
}

}  // namespace moespan
