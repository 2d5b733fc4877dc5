// VecAvx512: sixteen floats in a __m512 (AVX-512 F, BW, DQ, VL). The functions are those of VecScalar (vec_scalar.h).
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "vec_exp-inl.h"

namespace moespan {
namespace {

struct VecAvx512 {
    static constexpr int kLanes = 16;
    using Reg = __m512;

    static Reg zero() { return _mm512_setzero_ps(); }
    static Reg broadcast(float value) { return _mm512_set1_ps(value); }
    static Reg load(const float* p) { return _mm512_loadu_ps(p); }
    static Reg load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static Reg load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
    static Reg load_half_partial(const uint16_t* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
    static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
    static void store_half(uint16_t* p, Reg x) { _mm256_storeu_si256((__m256i*)p, to_half(x)); }
    static void store_partial(float* p, Reg x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
    static void store_half_partial(uint16_t* p, Reg x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_half(x)); }

    static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
    static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
    static Reg sqrt(Reg x) { return _mm512_sqrt_ps(x); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
    static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }

    static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Reg scale_by_power(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }
    static Reg exp(Reg x) { return vec_exp<VecAvx512>(x); }

    static void unzip(Reg a, Reg b, Reg& even, Reg& odd) {
        const __m512i even_index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        even = _mm512_permutex2var_ps(a, even_index, b);
        odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(even_index, _mm512_set1_epi32(1)), b);
    }
    static void zip(Reg even, Reg odd, Reg& a, Reg& b) {
        const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        a = _mm512_permutex2var_ps(even, index, odd);
        b = _mm512_permutex2var_ps(even, _mm512_add_epi32(index, _mm512_set1_epi32(8)), odd);
    }

    static float reduce_sum(Reg x) { return _mm512_reduce_add_ps(x); }
    static float reduce_max(Reg x) { return _mm512_reduce_max_ps(x); }

  private:
    static __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1u); }
    static __m256i to_half(Reg x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
}  // namespace moespan
