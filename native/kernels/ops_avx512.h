// OpsAvx512: the integer side on AVX-512 F, BW, DQ and VL. The functions are those of OpsScalar (ops_scalar.h).
//
// Row order, whose gemv memory limits, works on 32 codes at a time as AVX2 does; tiles and panels are 16 rows wide.
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
    // An entry of 8 codes is broadcast from memory and stays in its own place: every port for vectors can do that, where only one inserts.
    template <class Pick>
    static Codes pick(const uint64_t* grid, const Pick* p) {
        const auto at = [=](int i) { return _mm_loadl_epi64((const __m128i*)(grid + p[i])); };
        __m256i entries = _mm256_zextsi128_si256(at(0));
#pragma GCC unroll 3
        for (int i = 1; i < 4; ++i) entries = _mm256_mask_broadcastq_epi64(entries, (__mmask8)(1 << i), at(i));
        return entries;
    }
    template <class Pick>
    static Codes pick(const uint32_t* grid, const Pick* p) {
        return Narrow::pick(grid, p);
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

    static Sums dot_unsigned(Codes w, Codes x) { return Narrow::dot_unsigned(w, x); }
    static Sums dot_signed(Codes w, Codes x) { return Narrow::dot_signed(w, x); }
    static Sums dot_two_nibbles(const uint8_t* a, const uint8_t* b, const int8_t* x) { return Narrow::dot_two_nibbles(a, b, x); }
    static Sums dot_two_values(const uint8_t* a, const uint8_t* b, const int8_t* values, const int8_t* x) {
        return Narrow::dot_two_values(a, b, values, x);
    }
    static Sums dot_two_five_bits(const FiveBits& a, const FiveBits& b, const int8_t* x) { return Narrow::dot_two_five_bits(a, b, x); }
    static __m256 to_float(Sums s) { return Narrow::to_float(s); }

    static constexpr int kTokens = 8;

    static void store_transposed(const Codes* rows, uint8_t* dst, size_t stride) { Narrow::store_transposed(rows, dst, stride); }

    // Products of unsigned codes are added in 16 bits as long as they fit, as in OpsAvx2.
    template <int T, int steps, bool kSigned, int kMax>
    static void dot_panel(const uint8_t* w, const int8_t* const* x, Reg* out) {
        constexpr int kChain = Narrow::chain_length(steps, kSigned, kMax);
        __m512i sums[T];
        for (int i = 0; i < steps; i += kChain) {
            __m512i chain[T];
            for (int s = i; s < i + kChain && s < steps; ++s) {
                const Signs<kSigned> weight(_mm512_loadu_si512(w + 64 * s));
                for (int t = 0; t < T; ++t) {
                    const __m512i product = _mm512_maddubs_epi16(weight.magnitude, weight.give_to(four(x[t] + 4 * s)));
                    chain[t] = s == i ? product : in_order(_mm512_add_epi16(chain[t], product));
                }
            }
            for (int t = 0; t < T; ++t) {
                const __m512i wide = widen(chain[t]);
                sums[t] = i == 0 ? wide : _mm512_add_epi32(sums[t], wide);
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
    static Reg lanes_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(lanes(p)); }
    static Reg lanes_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
    template <int steps, bool kSigned, int kMax>
    static Reg dot_steps(const Step* w, const int8_t* x) {
        constexpr int kChain = Narrow::chain_length(steps, kSigned, kMax);
        __m512i sum;
        for (int i = 0; i < steps; i += kChain) {
            __m512i chain;
            for (int s = i; s < i + kChain && s < steps; ++s) {
                const Signs<kSigned> weight(w[s]);
                const __m512i product = _mm512_maddubs_epi16(weight.magnitude, weight.give_to(four(x + 4 * s)));
                chain = s == i ? product : in_order(_mm512_add_epi16(chain, product));
            }
            sum = i == 0 ? widen(chain) : _mm512_add_epi32(sum, widen(chain));
        }
        return _mm512_cvtepi32_ps(sum);
    }

    using Ints = __m512i;
    static Ints no_ints() { return _mm512_setzero_si512(); }
    static Ints load_ints(const float* p) { return _mm512_loadu_si512(p); }
    static void store_ints(float* p, Ints n) { _mm512_storeu_si512(p, n); }
    static Reg floats(Ints n) { return _mm512_cvtepi32_ps(n); }
    static Ints low_nibbles(const uint8_t* p) {  // as in OpsAvx2
        const __m512i once = _mm512_and_si512(lanes(p), _mm512_set1_epi32(15));
        return _mm512_or_si512(once, _mm512_slli_epi32(once, 16));
    }
    static Reg high_nibbles(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(lanes(p), 4)); }
    template <int steps, int kMax>
    static Ints add_scaled_steps(const Step* w, const int8_t* x, Ints factor, Ints sum) {
        static_assert(Narrow::chain_length(steps, false, kMax) == steps);
        __m512i chain;
        for (int s = 0; s < steps; ++s) {
            const __m512i product = _mm512_maddubs_epi16(w[s], four(x + 4 * s));
            chain = s == 0 ? product : in_order(_mm512_add_epi16(chain, product));
        }
        return _mm512_add_epi32(sum, _mm512_madd_epi16(chain, factor));
    }
    template <int T, int steps, int kMax>
    static void add_scaled_panel(const uint8_t* w, const int8_t* const* x, Ints factor, Ints* sums) {
        Step codes[steps];
        for (int s = 0; s < steps; ++s) codes[s] = load_step(w + 64 * s);
        for (int t = 0; t < T; ++t) sums[t] = add_scaled_steps<steps, kMax>(codes, x[t], factor, sums[t]);
    }

    static void quantize32(const float* x, float inverse, int8_t* codes, int32_t* low_sum, int32_t* high_sum) {
        Narrow::quantize32(x, inverse, codes, low_sum, high_sum);
    }
    static float max_abs32(const float* x) { return Narrow::max_abs32(x); }

  protected:
    // Weights times signed activations, as instructions take them: unsigned first. Signed weights give their sign away.
    template <bool kSigned>
    struct Signs {
        __m512i magnitude;
        __mmask64 negative;
        explicit Signs(__m512i w) : magnitude(kSigned ? _mm512_abs_epi8(w) : w), negative(kSigned ? _mm512_movepi8_mask(w) : 0) {}
        __m512i give_to(__m512i x) const { return kSigned ? _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x) : x; }
    };
    static __m512i lanes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
    // A token's four activations of a step, for all rows.
    static __m512i four(const int8_t* x) {
        int32_t codes;
        memcpy(&codes, x, sizeof(codes));
        return _mm512_set1_epi32(codes);
    }
    // 16 more in the bytes whose bit is set.
    static Codes add_sixteens(Codes c, uint32_t bits) { return _mm256_mask_add_epi8(c, bits, c, _mm256_set1_epi8(16)); }
    static uint32_t load32(const uint8_t* p) {
        uint32_t bits;
        memcpy(&bits, p, sizeof(bits));
        return bits;
    }

  private:
    static __m512i widen(__m512i pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
    static __m512i in_order(__m512i sum) {  // as in OpsAvx2
        __asm__("" : "+v"(sum));
        return sum;
    }
};

}  // namespace
}  // namespace moespan
