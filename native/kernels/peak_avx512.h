// The peak loops of AVX-512 F and BW.
#pragma once

#include <immintrin.h>

#include "peak-inl.h"
#include "vec_avx512.h"

namespace moespan {
namespace {

// As in peak_avx2.h: maddubs, and its 16-bit sums added.
inline float peak_int8_avx512(size_t rounds, float value) {
    constexpr int kSums = 16;
    typedef short Sum __attribute__((vector_size(64)));  // as an __m512i, gcc 12 copies every sum in every round
    __m512i weights = _mm512_set1_epi8((char)(int)value);
    const __m512i input = _mm512_set1_epi8(1);
    Sum sums[kSums] = {};
    for (; rounds > 0; --rounds) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) {
            __asm__ volatile("" : "+v"(weights));  // new weights, as far as the compiler knows: no product may be made once for all rounds
            sums[i] += (Sum)_mm512_maddubs_epi16(weights, input);
        }
    }
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    return (float)sums[0][0];
}

struct PeakAvx512 {
    using Vec = VecAvx512;
    static constexpr PeakLoop kLoops[] = {f32_loop<VecAvx512, 16>(), {"int8", 2.0 * 64 * 16, peak_int8_avx512}};
};

}  // namespace
}  // namespace moespan
