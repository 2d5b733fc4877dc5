// OpsAvx512Vnni: OpsAvx512 with the dot products of VNNI, whose dpbusd sums four products of unsigned and signed bytes into 32 bits, never saturating.
#pragma once

#include "ops_avx512.h"

namespace moespan {
namespace {

struct OpsAvx512Vnni : OpsAvx512 {
    static Sums dot_unsigned(Codes w, Codes x) { return _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x); }
    static Sums dot_signed(Codes w, Codes x) { return dot_unsigned(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)); }
    static Sums dot_two_nibbles(const uint8_t* a, const uint8_t* b, const int8_t* x) {
        const Narrow::Halves w = Narrow::two_nibbles(a, b), codes = Narrow::regroup(x);
        return _mm256_dpbusd_epi32(dot_unsigned(w.low, codes.low), w.high, codes.high);
    }
    static Sums dot_two_values(const uint8_t* a, const uint8_t* b, const int8_t* values, const int8_t* x) {
        const Narrow::Halves packed = Narrow::two_nibbles(a, b), codes = Narrow::regroup(x);
        const Codes low = lookup(packed.low, values), high = lookup(packed.high, values);
        const Sums sums = dot_signed(low, codes.low);
        return _mm256_dpbusd_epi32(sums, _mm256_abs_epi8(high), _mm256_sign_epi8(codes.high, high));
    }
    static Sums dot_two_five_bits(const FiveBits& a, const FiveBits& b, const int8_t* x) {
        const Narrow::Halves w = Narrow::two_nibbles(a.qs, b.qs), codes = Narrow::regroup(x);
        const uint32_t high_a = load32(a.qh), high_b = load32(b.qh);
        const Codes low = add_sixteens(w.low, (high_a & 0xffff) | high_b << 16), high = add_sixteens(w.high, high_a >> 16 | (high_b & 0xffff0000));
        return _mm256_dpbusd_epi32(dot_unsigned(low, codes.low), high, codes.high);
    }

    template <int T, int steps, bool kSigned, int kMax>
    static void dot_panel(const uint8_t* w, const int8_t* const* x, Reg* out) {
        __m512i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
        for (int s = 0; s < steps; ++s) {
            const Signs<kSigned> weight(_mm512_loadu_si512(w + 64 * s));
            for (int t = 0; t < T; ++t) sums[t] = _mm512_dpbusd_epi32(sums[t], weight.magnitude, weight.give_to(four(x[t] + 4 * s)));
        }
        for (int t = 0; t < T; ++t) out[t] = _mm512_cvtepi32_ps(sums[t]);
    }

    template <int steps, bool kSigned, int kMax>
    static Reg dot_steps(const Step* w, const int8_t* x) {
        __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // two chains hide the latency of dpbusd
#pragma GCC unroll 8
        for (int s = 0; s < steps; ++s) {
            const Signs<kSigned> weight(w[s]);
            sums[s % 2] = _mm512_dpbusd_epi32(sums[s % 2], weight.magnitude, weight.give_to(four(x + 4 * s)));
        }
        return _mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1]));
    }

    // A sum of products fits the low half of its lane, and its sign fills the high one: dpwssd multiplies by a factor and by 0.
    static Ints low_nibbles(const uint8_t* p) { return _mm512_and_si512(lanes(p), _mm512_set1_epi32(15)); }
    template <int steps, int kMax>
    static Ints add_scaled_steps(const Step* w, const int8_t* x, Ints factor, Ints sum) {
        static_assert(4 * steps * kMax * 127 < 1 << 15);
        __m512i dots = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int s = 0; s < steps; ++s) dots = _mm512_dpbusd_epi32(dots, w[s], four(x + 4 * s));
        return _mm512_dpwssd_epi32(sum, dots, factor);
    }
    template <int T, int steps, int kMax>
    static void add_scaled_panel(const uint8_t* w, const int8_t* const* x, Ints factor, Ints* sums) {
        Step codes[steps];
        for (int s = 0; s < steps; ++s) codes[s] = load_step(w + 64 * s);
        for (int t = 0; t < T; ++t) sums[t] = add_scaled_steps<steps, kMax>(codes, x[t], factor, sums[t]);
    }
};

}  // namespace
}  // namespace moespan
