// The peak loops of AVX2 and FMA.
#pragma once

#include "peak-inl.h"
#include "vec_avx2.h"

namespace moespan {
namespace {

// Bytes are multiplied by maddubs, whose 16-bit sums are then added: two instructions for 64 operations. (Widening them to 32 bits now and
// then is left out: how often depends on the weights' bits.)
inline float peak_int8_avx2(size_t rounds, float value) {
    constexpr int kSums = 8;
    typedef short Sum __attribute__((vector_size(32)));  // as an __m256i, gcc 12 copies every sum in every round
    __m256i weights = _mm256_set1_epi8((char)(int)value);
    const __m256i input = _mm256_set1_epi8(1);
    Sum sums[kSums] = {};
    for (; rounds > 0; --rounds) {
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) {
            __asm__ volatile("" : "+x"(weights));  // new weights, as far as the compiler knows: no product may be made once for all rounds
            sums[i] += (Sum)_mm256_maddubs_epi16(weights, input);
        }
    }
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    return (float)sums[0][0];
}

struct PeakAvx2 {
    using Vec = VecAvx2;
    static constexpr PeakLoop kLoops[] = {f32_loop<VecAvx2, 12>(), {"int8", 2.0 * 32 * 8, peak_int8_avx2}};
};

}  // namespace
}  // namespace moespan
