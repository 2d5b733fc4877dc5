// Loops that do nothing but multiply and add, on registers: the peak of an instruction set, which no kernel can pass.
//
// An instruction set lists its loops in peak_*.h, with the Vec that its memory sweep loads with; one with other units (tiles, bf16) adds its own there.
#pragma once

#include <stddef.h>

#include "isa/kernels.h"

namespace moespan {
namespace {

// Fused multiply-adds on kSums sums that do not wait for each other; the sums stay near `value`, far from infinities and subnormals.
template <class V, int kSums>
float peak_f32(size_t rounds, float value) {
    const auto half = V::broadcast(0.5f), addend = V::broadcast(0.5f * value);
    typename V::Reg sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = V::broadcast(value + (float)i);
    for (; rounds > 0; --rounds) {
#pragma GCC unroll 32
        for (int i = 0; i < kSums; ++i) sums[i] = V::fma(sums[i], half, addend);
    }
    for (int i = 1; i < kSums; ++i) sums[0] = V::add(sums[0], sums[i]);
    return V::reduce_sum(sums[0]);
}

template <class V, int kSums>
constexpr PeakLoop f32_loop() {
    return {"f32", 2.0 * V::kLanes * kSums, peak_f32<V, kSums>};
}

}  // namespace
}  // namespace moespan
