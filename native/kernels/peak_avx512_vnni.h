// The peak loops of AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include "peak-inl.h"
#include "vec_avx512.h"

namespace moespan {
namespace {

inline float peak_int8_avx512_vnni(size_t rounds, float value) {
    constexpr int kSums = 16;
    typedef int Sum __attribute__((vector_size(64)));  // as an __m512i, gcc 12 copies every sum in every round
    const __m512i weights = _mm512_set1_epi8((char)(int)value), input = _mm512_set1_epi8(1);
    Sum sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = (Sum)_mm512_set1_epi32(i);  // all different: equal ones would be computed once
    for (; rounds > 0; --rounds) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = (Sum)_mm512_dpbusd_epi32((__m512i)sums[i], weights, input);
    }
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    return (float)sums[0][0];
}

struct PeakAvx512Vnni {
    using Vec = VecAvx512;
    static constexpr PeakLoop kLoops[] = {f32_loop<VecAvx512, 16>(), {"int8", 2.0 * 64 * 16, peak_int8_avx512_vnni}};
};

}  // namespace
}  // namespace moespan
