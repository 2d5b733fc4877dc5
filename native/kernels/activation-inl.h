// What happens to activations between products: rounding to int8, and the SwiGLU gate.
#pragma once

#include "formats-inl.h"

namespace moespan {
namespace {

// Symmetric int8 with one scale for each 32 values, scale = max|x| / 127. A NaN or inf makes its group's scale NaN or inf: never hidden.
template <class Ops>
void quantize(const float* x, size_t cols, int8_t* codes, float* scales, float* sums, float* half_sums) {
    constexpr float kTiny = 1e-30f;  // below it 127 / max would overflow; such a group is 0
    for (size_t i = 0; i < cols / kSubBlock; ++i) {
        const float largest = Ops::max_abs32(x + i * kSubBlock);
        const bool tiny = largest < kTiny;
        const float scale = tiny ? 0.0f : largest / 127.0f;
        int32_t low, high;
        Ops::quantize32(x + i * kSubBlock, tiny ? 0.0f : 127.0f / largest, codes + i * kSubBlock, &low, &high);
        scales[i] = scale;
        sums[i] = scale * (float)(low + high);
        half_sums[2 * i] = scale * (float)low;
        half_sums[2 * i + 1] = scale * (float)high;
    }
}

// silu(g) = g / (1 + exp(-g)).
template <class Ops>
inline typename Ops::Reg silu_times(typename Ops::Reg gate, typename Ops::Reg up) {
    const auto one = Ops::broadcast(1.0f);
    return Ops::mul(Ops::div(gate, Ops::add(one, Ops::exp(Ops::sub(Ops::zero(), gate)))), up);
}

template <class Ops>
void silu_mul(const float* gate, const float* up, float* out, size_t count) {
    size_t i = 0;
    for (; i + Ops::kLanes <= count; i += Ops::kLanes) Ops::store(out + i, silu_times<Ops>(Ops::load(gate + i), Ops::load(up + i)));
    const int rest = (int)(count - i);
    if (rest > 0) Ops::store_partial(out + i, silu_times<Ops>(Ops::load_partial(gate + i, rest), Ops::load_partial(up + i, rest)), rest);
}

}  // namespace
}  // namespace moespan
