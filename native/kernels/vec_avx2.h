// VecAvx2: eight floats in a __m256 (AVX2, FMA, F16C). The functions are those of VecScalar (vec_scalar.h).
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "vec_exp-inl.h"

namespace moespan {
namespace {

struct VecAvx2 {
    static constexpr int kLanes = 8;
    using Reg = __m256;

    static Reg zero() { return _mm256_setzero_ps(); }
    static Reg broadcast(float value) { return _mm256_set1_ps(value); }
    static Reg load(const float* p) { return _mm256_loadu_ps(p); }
    static Reg load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static Reg load_partial(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
    static Reg load_half_partial(const uint16_t* p, int n) {
        uint16_t copy[kLanes] = {};
        memcpy(copy, p, (size_t)n * sizeof(*p));
        return load_half(copy);
    }
    static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
    static void store_half(uint16_t* p, Reg x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
    static void store_partial(float* p, Reg x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
    static void store_half_partial(uint16_t* p, Reg x, int n) {
        uint16_t copy[kLanes];
        store_half(copy, x);
        memcpy(p, copy, (size_t)n * sizeof(*p));
    }

    static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
    static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
    static Reg sqrt(Reg x) { return _mm256_sqrt_ps(x); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
    static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }

    static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // x * 2^n for an integer-valued n in [-252, 254], in two steps so that neither factor leaves the normal range.
    static Reg scale_by_power(Reg x, Reg n) {
        const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1);
        return mul(mul(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(exponent, half)));
    }
    static Reg exp(Reg x) { return vec_exp<VecAvx2>(x); }

    static void unzip(Reg a, Reg b, Reg& even, Reg& odd) {
        even = order_quarters(_mm256_shuffle_ps(a, b, 0x88));  // a0 a2 b0 b2 | a4 a6 b4 b6
        odd = order_quarters(_mm256_shuffle_ps(a, b, 0xdd));
    }
    static void zip(Reg even, Reg odd, Reg& a, Reg& b) {
        const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
        a = _mm256_permute2f128_ps(low, high, 0x20);
        b = _mm256_permute2f128_ps(low, high, 0x31);
    }

    static float reduce_sum(Reg x) {
        __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
    }
    static float reduce_max(Reg x) {
        __m128 best = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        best = _mm_max_ps(best, _mm_movehl_ps(best, best));
        return _mm_cvtss_f32(_mm_max_ss(best, _mm_movehdup_ps(best)));
    }

  private:
    // Pairs of floats 0 1 2 3 -> 0 2 1 3.
    static __m256 order_quarters(__m256 x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); }
    static __m256i first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
    static __m256 power_of_two(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
};

}  // namespace
}  // namespace moespan
