// OpsAvx512: the integer side on AVX-512 with VNNI. The functions are those of OpsScalar (ops_scalar.h).
//
// GEMV, which memory limits, works on 32 codes at a time as AVX2 does, with dpbusd for the products; panels are 16 rows wide.
#pragma once

#include "ops_avx2.h"
#include "quant/blocks.h"
#include "quant/grids.h"
#include "vec_avx512.h"

namespace moespan {
namespace {

struct OpsAvx512 : VecAvx512 {
    using V8 = VecAvx2;
    using Narrow = OpsAvx2;
    using Codes = __m256i;
    using Sums = __m256i;

    static float half(uint16_t bits) { return Narrow::half(bits); }
    static Reg load_bf16(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    }
    static void prefetch(const void* p) { Narrow::prefetch(p); }
    static void prefetch_far(const void* p) { Narrow::prefetch_far(p); }

    static Codes load_codes(const void* p) { return Narrow::load_codes(p); }
    static void store_codes(void* p, Codes c) { Narrow::store_codes(p, c); }
    static Codes nibbles(const uint8_t* p) { return Narrow::nibbles(p); }
    static Codes five_bits(const FiveBits& q) { return add_sixteens(nibbles(q.qs), load32(q.qh)); }
    static Codes bits(const uint8_t* p, int shift, uint8_t mask) { return Narrow::bits(p, shift, mask); }
    static Codes or_high(Codes low, Codes high) { return Narrow::or_high(low, high); }
    template <int to>
    static Codes or_bit(Codes low, const uint8_t* p, int from) {
        return _mm256_mask_add_epi8(low, _mm256_test_epi8_mask(load_codes(p), _mm256_set1_epi8((char)(1 << from))), low, _mm256_set1_epi8(1 << to));
    }
    static Codes lookup(Codes c, const int8_t* values) { return Narrow::lookup(c, values); }

    template <size_t stride>
    static void load_words(const uint8_t* p, uint32_t* words) {
        Narrow::load_words<stride>(p, words);
    }
    template <PickBits place>
    static void join_picks(const uint8_t* low, const uint8_t* high, uint16_t* picks) {
        Narrow::join_picks<place>(low, high, picks);
    }
    template <class Entry, class Pick>
    static Codes pick(const Entry* grid, const Pick* picks) {
        return Narrow::pick(grid, picks);
    }
    static Codes negate(Codes c, uint32_t bits) { return _mm256_mask_sub_epi8(c, bits, _mm256_setzero_si256(), c); }
    static Codes add_to_eights(Codes c, const uint8_t* addends) { return Narrow::add_to_eights(c, addends); }

    using HalfPairs = Narrow::HalfPairs;
    template <size_t stride>
    static HalfPairs gather_halves(const uint8_t* p, int count) {
        return Narrow::gather_halves<stride>(p, count);
    }
    template <size_t stride>
    static __m256 gather_powers(const uint8_t* p, int count) {
        return Narrow::gather_powers<stride>(p, count);
    }
    static __m256 from_u8(const uint8_t* p) { return Narrow::from_u8(p); }
    template <int shift>
    static __m256 from_byte_fields(const uint8_t* p) {
        return Narrow::from_byte_fields<shift>(p);
    }
    template <int bits>
    static __m256 from_fields(uint32_t word) {
        return Narrow::from_fields<bits>(word);
    }
    static __m256 from_i8(const int8_t* p) { return Narrow::from_i8(p); }
    static __m256 twice_low(__m256 v) { return Narrow::twice_low(v); }
    static __m256 twice_high(__m256 v) { return Narrow::twice_high(v); }
    static __m256 pair(const float* p) { return Narrow::pair(p); }

    // dpbusd sums four products of unsigned w and signed x into 32 bits without saturating.
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
    static __m256 to_float(Sums s) { return Narrow::to_float(s); }

    static constexpr int kTokens = 8;

    static void store_transposed(const Codes* rows, uint8_t* dst, size_t stride) { Narrow::store_transposed(rows, dst, stride); }

    template <int T, int steps, bool kSigned, int kMax>
    static void dot_panel(const uint8_t* w, const int8_t* const* x, Reg* out) {
        __m512i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
        for (int s = 0; s < steps; ++s) {
            const __m512i codes = _mm512_loadu_si512(w + 64 * s);
            const __m512i weight = kSigned ? _mm512_abs_epi8(codes) : codes;
            const __mmask64 negative = kSigned ? _mm512_movepi8_mask(codes) : 0;
            for (int t = 0; t < T; ++t) {
                int32_t four;
                memcpy(&four, x[t] + 4 * s, sizeof(four));
                const __m512i input = _mm512_set1_epi32(four);
                const __m512i signed_input = kSigned ? _mm512_mask_sub_epi8(input, negative, _mm512_setzero_si512(), input) : input;
                sums[t] = _mm512_dpbusd_epi32(sums[t], weight, signed_input);
            }
        }
        for (int t = 0; t < T; ++t) out[t] = _mm512_cvtepi32_ps(sums[t]);
    }

    using Step = __m512i;
    static constexpr int kStripTokens = 8;
    static Step load_step(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store_step(uint8_t* p, Step s) { _mm512_storeu_si512(p, s); }
    template <int shift, int mask>
    static Step field(Step s) {
        const Step shifted = shift < 0 ? _mm512_slli_epi16(s, shift < 0 ? -shift : 0) : _mm512_srli_epi16(s, shift < 0 ? 0 : shift);
        return _mm512_and_si512(shift == 0 ? s : shifted, _mm512_set1_epi8((char)mask));
    }
    static Step or_step(Step a, Step b) { return _mm512_or_si512(a, b); }
    static Step lookup_step(Step s, const int8_t* values) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)values)), s);
    }
    static Reg lanes_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
    static Reg lanes_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
    template <int steps, bool kSigned, int kMax>
    static Reg dot_steps(const Step* w, const int8_t* x) {
        __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // two chains hide the latency of dpbusd
#pragma GCC unroll 8
        for (int s = 0; s < steps; ++s) {
            int32_t four;
            memcpy(&four, x + 4 * s, sizeof(four));
            const __m512i input = _mm512_set1_epi32(four);
            if (kSigned) {
                const __m512i signed_input = _mm512_mask_sub_epi8(input, _mm512_movepi8_mask(w[s]), _mm512_setzero_si512(), input);
                sums[s % 2] = _mm512_dpbusd_epi32(sums[s % 2], _mm512_abs_epi8(w[s]), signed_input);
            } else {
                sums[s % 2] = _mm512_dpbusd_epi32(sums[s % 2], w[s], input);
            }
        }
        return _mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1]));
    }

    static void quantize32(const float* x, float inverse, int8_t* codes, int32_t* low_sum, int32_t* high_sum) {
        Narrow::quantize32(x, inverse, codes, low_sum, high_sum);
    }
    static float max_abs32(const float* x) { return Narrow::max_abs32(x); }

  private:
    // 16 more in the bytes whose bit is set.
    static Codes add_sixteens(Codes c, uint32_t bits) { return _mm256_mask_add_epi8(c, bits, c, _mm256_set1_epi8(16)); }
    static uint32_t load32(const uint8_t* p) {
        uint32_t bits;
        memcpy(&bits, p, sizeof(bits));
        return bits;
    }
};

}  // namespace
}  // namespace moespan
