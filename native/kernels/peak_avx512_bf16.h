// The peak of AVX512_BF16: dpbf16 on registers alone.
#pragma once

#include "peak-inl.h"
#include "vec_avx512.h"

namespace moespan {
namespace {

inline float peak_bf16_avx512(size_t rounds, float value) {
    constexpr int kSums = 16;
    const __m512bh weights = (__m512bh)VecAvx512::broadcast(value), input = (__m512bh)VecAvx512::broadcast(value);
    typedef float Sum __attribute__((vector_size(64)));  // as an __m512, gcc 12 copies every sum in every round
    Sum sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = (Sum)VecAvx512::broadcast((float)i);  // all different: equal ones would be computed once
    for (; rounds > 0; --rounds) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = (Sum)_mm512_dpbf16_ps((__m512)sums[i], weights, input);
    }
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    return sums[0][0];
}

constexpr PeakLoop kAvx512Bf16Peak = {"bf16", 2.0 * 32 * 16, peak_bf16_avx512};

}  // namespace
}  // namespace moespan
