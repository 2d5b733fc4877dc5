// OpsAvx2: the integer side on AVX2, on top of VecAvx2's floats. The functions are those of OpsScalar (ops_scalar.h).
#pragma once

#include "quant/blocks.h"
#include "quant/grids.h"
#include "vec_avx2.h"

namespace moespan {
namespace {

struct OpsAvx2 : VecAvx2 {
    using V8 = VecAvx2;
    using Codes = __m256i;
    using Sums = __m256i;

    static float half(uint16_t bits) { return _cvtsh_ss(bits); }
    static Reg load_bf16(const uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    }
    static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

    static Codes load_codes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static void store_codes(void* p, Codes c) { _mm256_storeu_si256((__m256i*)p, c); }
    static Codes nibbles(const uint8_t* p) {
        const __m128i packed = _mm_loadu_si128((const __m128i*)p);
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
        return _mm256_and_si256(both, _mm256_set1_epi8(15));
    }
    static Codes five_bits(const FiveBits& q) {
        return _mm256_or_si256(nibbles(q.qs), _mm256_and_si256(bytes_with_bits((uint32_t)load32(q.qh)), _mm256_set1_epi8(16)));
    }
    static Codes bits(const uint8_t* p, int shift, uint8_t mask) {
        return _mm256_and_si256(_mm256_srli_epi16(load_codes(p), shift), _mm256_set1_epi8((char)mask));
    }
    static Codes or_high(Codes low, Codes high) { return _mm256_or_si256(low, _mm256_slli_epi16(high, 4)); }
    template <int to>
    static Codes or_bit(Codes low, const uint8_t* p, int from) {
        const __m256i bytes = load_codes(p), in_place = from < to ? _mm256_slli_epi16(bytes, to - from) : _mm256_srli_epi16(bytes, from - to);
        return _mm256_or_si256(low, _mm256_and_si256(in_place, _mm256_set1_epi8(1 << to)));
    }
    static Codes lookup(Codes c, const int8_t* values) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)values)), c);
    }

    template <size_t stride>
    static void load_words(const uint8_t* p, uint32_t* words) {
        static_assert(stride == 4 || stride == 8);
        if (stride == 4) return store_codes(words, load_codes(p));
        // Each word and the four bytes before it, so as not to read behind the last: words 0 1 4 5 2 3 6 7.
        const __m256 first = _mm256_loadu_ps((const float*)(p - 4)), second = _mm256_loadu_ps((const float*)(p + 28));
        const __m256i mixed = _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd));
        store_codes(words, _mm256_permute4x64_epi64(mixed, 0xd8));
    }
    // In lanes of 16 bits: each pick's unit is moved up so that its field begins at kTop, which is where the highest field of a unit lies, or 8.
    template <PickBits place>
    static void join_picks(const uint8_t* low, const uint8_t* high, uint16_t* picks) {
        constexpr int kHighest = place.stride * (place.picks - 1), kTop = kHighest < 8 ? 8 : kHighest;
        struct alignas(32) Lanes {
            uint8_t source[32];
            uint16_t factor[16];
        };
        static constexpr Lanes kLanesOf = [] {
            Lanes lanes{};
            for (int i = 0; i < 16; ++i) {
                lanes.source[2 * i] = (uint8_t)(i / place.picks * place.unit_bytes);
                lanes.source[2 * i + 1] = place.unit_bytes == 2 ? (uint8_t)(lanes.source[2 * i] + 1) : 0x80;
                lanes.factor[i] = (uint16_t)(1 << (kTop - place.stride * (i % place.picks)));
            }
            return lanes;
        }();
        int64_t units = 0;
        memcpy(&units, high, 16 / place.picks * place.unit_bytes);
        const __m256i in_lanes = _mm256_shuffle_epi8(_mm256_set1_epi64x(units), load_codes(kLanesOf.source));
        const __m256i moved = _mm256_and_si256(_mm256_mullo_epi16(in_lanes, load_codes(kLanesOf.factor)), _mm256_set1_epi16(((1 << place.bits) - 1) << kTop));
        const __m256i low_bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)low));
        store_codes(picks, _mm256_or_si256(low_bytes, kTop == 8 ? moved : _mm256_srli_epi16(moved, kTop - 8)));
    }
    template <class Pick>
    static Codes pick(const uint64_t* grid, const Pick* p) {
        const auto two = [=](int i) {
            const __m128i first = _mm_loadl_epi64((const __m128i*)(grid + p[i]));
            return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), (const __m64*)(grid + p[i + 1])));
        };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(two(0)), two(2), 1);
    }
    template <class Pick>
    static Codes pick(const uint32_t* grid, const Pick* p) {
        const auto four = [=](int i) { return _mm_setr_epi32((int)grid[p[i]], (int)grid[p[i + 1]], (int)grid[p[i + 2]], (int)grid[p[i + 3]]); };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(four(0)), four(4), 1);
    }
    static Codes negate(Codes c, uint32_t bits) {
        const __m256i negative = bytes_with_bits(bits);
        return _mm256_sub_epi8(_mm256_xor_si256(c, negative), negative);
    }
    static Codes add_to_eights(Codes c, const uint8_t* addends) {
        const __m256i eighths = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load32(addends)));
        const __m256i first_of_eight = _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808);
        return _mm256_add_epi8(c, _mm256_shuffle_epi8(eighths, first_of_eight));
    }

    struct HalfPairs {
        __m256 first, second;
    };
    template <size_t stride>
    static HalfPairs gather_halves(const uint8_t* p, int count) {
        const auto at = [=](int i) {
            int32_t both = 0;
            if (i < count) memcpy(&both, p + i * stride, sizeof(both));
            return both;
        };
        const __m256 a = _mm256_cvtph_ps(_mm_setr_epi32(at(0), at(1), at(4), at(5)));  // first, second of blocks 0 1 | 4 5
        const __m256 b = _mm256_cvtph_ps(_mm_setr_epi32(at(2), at(3), at(6), at(7)));  // of blocks 2 3 | 6 7
        return {_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)};
    }
    template <size_t stride>
    static __m256 gather_powers(const uint8_t* p, int count) {
        const auto at = [=](int i) { return i < count ? (int)p[i * stride] : -1; };  // a shift by -1 gives 0
        const __m256i e = _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
        const __m256i below = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
        return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, below, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
    }
    static __m256 from_u8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
    template <int shift>
    static __m256 from_byte_fields(const uint8_t* p) {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
        return _mm256_cvtepi32_ps(shift == 4 ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
    }
    template <int bits>
    static __m256 from_fields(uint32_t word) {
        const __m256i shifts = _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits);
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)word), shifts), _mm256_set1_epi32((1 << bits) - 1)));
    }
    static __m256 from_i8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
    static __m256 twice_low(__m256 v) { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)); }
    static __m256 twice_high(__m256 v) { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)); }
    static __m256 pair(const float* p) {
        const __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd((const double*)p));
        return _mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    }

    // maddubs adds two products into 16 bits, saturating: 2 * 127 * 128 = 32512 fits, 2 * 127 * 255 would not. So unsigned codes may go
    // up to 128, and signed ones give their sign to x.
    static Sums dot_unsigned(Codes w, Codes x) { return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)); }
    static Sums dot_signed(Codes w, Codes x) { return dot_unsigned(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)); }
    // The 16-bit sums of low and high nibbles are added before they are widened.
    static Sums dot_two_nibbles(const uint8_t* a, const uint8_t* b, const int8_t* x) {
        return dot_halves(two_nibbles(a, b), regroup(x));
    }
    // Codes of up to 127: two products fill 16 bits.
    static Sums dot_two_values(const uint8_t* a, const uint8_t* b, const int8_t* values, const int8_t* x) {
        const Halves packed = two_nibbles(a, b), codes = regroup(x);
        return _mm256_add_epi32(dot_signed(lookup(packed.low, values), codes.low), dot_signed(lookup(packed.high, values), codes.high));
    }
    static Sums dot_two_five_bits(const FiveBits& a, const FiveBits& b, const int8_t* x) {
        // Their first four bytes are wanted; to broadcast those here would be two shuffles more, and shuffles are what this waits for.
        const __m256i high_bits = _mm256_loadu2_m128i((const __m128i*)&b, (const __m128i*)&a);
        const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0, 0x01010101, 0x01010101));
        const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x02020202, 0x02020202, 0x03030303, 0x03030303));
        Halves w = two_nibbles(a.qs, b.qs);
        w.low = _mm256_or_si256(w.low, sixteens(_mm256_shuffle_epi8(high_bits, first)));
        w.high = _mm256_or_si256(w.high, sixteens(_mm256_shuffle_epi8(high_bits, second)));
        return dot_halves(w, regroup(x));
    }
    static __m256 to_float(Sums s) { return _mm256_cvtepi32_ps(s); }

    static constexpr int kTokens = 4;

    static void store_transposed(const Codes* rows, uint8_t* dst, size_t stride) {
        __m256i pairs[8], quads[8];
        for (int i = 0; i < 8; i += 2) {  // dwords of two rows, interleaved
            pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {  // of four rows: in quads[i + s], the low half has step s, the high half step s + 4
            quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
            quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
            quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
            quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        }
        for (int s = 0; s < 4; ++s) {
            store_codes(dst + s * stride, _mm256_permute2x128_si256(quads[s], quads[s + 4], 0x20));
            store_codes(dst + (s + 4) * stride, _mm256_permute2x128_si256(quads[s], quads[s + 4], 0x31));
        }
    }

    // So many of maddubs' results fit into 16 bits, of unsigned codes up to `most`: they are added before they are widened (all eight steps of 4-bit codes).
    static constexpr int chain_length(int steps, bool is_signed, int most) {
        const int fit = is_signed ? 1 : 32767 / (2 * 127 * most);
        return fit < 1 ? 1 : fit < steps ? fit : steps;
    }
    template <int T, int steps, bool kSigned, int kMax>
    static void dot_panel(const uint8_t* w, const int8_t* const* x, Reg* out) {
        constexpr int kChain = chain_length(steps, kSigned, kMax);
        __m256i sums[T];
        for (int i = 0; i < steps; i += kChain) {
            __m256i chain[T];
            for (int s = i; s < i + kChain && s < steps; ++s) {
                const __m256i codes = load_codes(w + 32 * s);
                const __m256i weight = kSigned ? _mm256_abs_epi8(codes) : codes;
                for (int t = 0; t < T; ++t) {
                    int32_t four;
                    memcpy(&four, x[t] + 4 * s, sizeof(four));
                    const __m256i input = _mm256_set1_epi32(four);
                    const __m256i product = _mm256_maddubs_epi16(weight, kSigned ? _mm256_sign_epi8(input, codes) : input);
                    chain[t] = s == i ? product : in_order(_mm256_add_epi16(chain[t], product));
                }
            }
            for (int t = 0; t < T; ++t) {
                const __m256i wide = _mm256_madd_epi16(chain[t], _mm256_set1_epi16(1));
                sums[t] = i == 0 ? wide : _mm256_add_epi32(sums[t], wide);
            }
        }
        for (int t = 0; t < T; ++t) out[t] = to_float(sums[t]);
    }

    // gcc knows that whole numbers may be added in any order, and would keep all products of a chain on the stack to add them as a tree.
    static __m256i in_order(__m256i sum) {
        __asm__("" : "+x"(sum));
        return sum;
    }

    using Step = __m256i;
    static constexpr int kStripTokens = 4;
    static Step load_step(const uint8_t* p) { return load_codes(p); }
    static void store_step(uint8_t* p, Step s) { store_codes(p, s); }
    template <int shift, int mask>
    static Step field(Step s) {
        const Step shifted = shift < 0 ? _mm256_slli_epi16(s, shift < 0 ? -shift : 0) : _mm256_srli_epi16(s, shift < 0 ? 0 : shift);
        return _mm256_and_si256(shift == 0 ? s : shifted, _mm256_set1_epi8((char)mask));
    }
    static Step or_step(Step a, Step b) { return _mm256_or_si256(a, b); }
    static Step lookup_step(Step s, const int8_t* values) { return lookup(s, values); }
    static Reg lanes_u8(const uint8_t* p) { return from_u8(p); }
    static Reg lanes_i8(const int8_t* p) { return from_i8(p); }
    template <int steps, bool kSigned, int kMax>
    static Reg dot_steps(const Step* w, const int8_t* x) {
        constexpr int kChain = chain_length(steps, kSigned, kMax);
        __m256i sum;
        for (int i = 0; i < steps; i += kChain) {
            __m256i chain;
            for (int s = i; s < i + kChain && s < steps; ++s) {
                int32_t four;
                memcpy(&four, x + 4 * s, sizeof(four));
                const __m256i input = _mm256_set1_epi32(four);
                const __m256i product =
                    kSigned ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[s]), _mm256_sign_epi8(input, w[s])) : _mm256_maddubs_epi16(w[s], input);
                chain = s == i ? product : in_order(_mm256_add_epi16(chain, product));
            }
            const __m256i wide = _mm256_madd_epi16(chain, _mm256_set1_epi16(1));
            sum = i == 0 ? wide : _mm256_add_epi32(sum, wide);
        }
        return to_float(sum);
    }

    // Factors lie twice in their lane, in 16 bits: madd multiplies the sums of a chain by them where it would by ones.
    using Ints = __m256i;
    static Ints no_ints() { return _mm256_setzero_si256(); }
    static Ints load_ints(const float* p) { return load_codes(p); }
    static void store_ints(float* p, Ints n) { store_codes(p, n); }
    static Reg floats(Ints n) { return to_float(n); }
    static Ints low_nibbles(const uint8_t* p) { return _mm256_and_si256(bytes_twice(p), _mm256_set1_epi16(15)); }
    static Reg high_nibbles(const uint8_t* p) { return to_float(_mm256_srli_epi32(bytes_twice(p), 20)); }
    template <int steps, int kMax>
    static Ints add_scaled_steps(const Step* w, const int8_t* x, Ints factor, Ints sum) {
        static_assert(chain_length(steps, false, kMax) == steps);
        __m256i chain;
        for (int s = 0; s < steps; ++s) {
            const __m256i product = _mm256_maddubs_epi16(w[s], four(x + 4 * s));
            chain = s == 0 ? product : in_order(_mm256_add_epi16(chain, product));
        }
        return _mm256_add_epi32(sum, _mm256_madd_epi16(chain, factor));
    }
    template <int T, int steps, int kMax>
    static void add_scaled_panel(const uint8_t* w, const int8_t* const* x, Ints factor, Ints* sums) {
        Step codes[steps];
        for (int s = 0; s < steps; ++s) codes[s] = load_codes(w + 32 * s);
        for (int t = 0; t < T; ++t) sums[t] = add_scaled_steps<steps, kMax>(codes, x[t], factor, sums[t]);
    }

    // sums[part] + factors[part] * (the products of a token's 16 codes with a group of 16 rows in codes of 2 bits), from a sub-block's two lines. Fields
    // 1 and 3 stay where they are, and their sums are shifted in the place of both lines.
    template <int group>
    static void add_scaled_twos(const uint8_t* lines, const int8_t* x, const Ints* factors, Ints* sums) {
        const __m256i first = _mm256_set1_epi8(3), second = _mm256_set1_epi8(12);
        __m256i low[2], high[2];
#pragma GCC unroll 2
        for (int l = 0; l < 2; ++l) {
            const __m256i low_input = four(x + 4 * l), high_input = four(x + 8 + 4 * l);
#pragma GCC unroll 2
            for (int part = 0; part < 2; ++part) {
                const __m256i line = in_order(load_codes(lines + 64 * l + 32 * part)), fields = group == 0 ? line : _mm256_srli_epi16(line, 4);
                const __m256i low_products = _mm256_maddubs_epi16(_mm256_and_si256(fields, first), low_input);
                const __m256i high_products = _mm256_maddubs_epi16(_mm256_and_si256(fields, second), high_input);
                low[part] = in_order(l == 0 ? low_products : _mm256_add_epi16(low[part], low_products));
                high[part] = in_order(l == 0 ? high_products : _mm256_add_epi16(high[part], high_products));
            }
        }
        for (int part = 0; part < 2; ++part) {
            const __m256i chain = _mm256_add_epi16(low[part], _mm256_srai_epi16(high[part], 2));
            sums[part] = in_order(_mm256_add_epi32(sums[part], _mm256_madd_epi16(chain, factors[part])));
        }
    }

    // The products of a token with a sub-block of 16 rows in codes of 4 bits, from its lines: each is read once, and each part of x broadcast once for all
    // rows, in registers that steps would fill.
    static void dot_nibbles(const uint8_t* lines, const int8_t* x, Reg* out) {
        const __m256i mask = _mm256_set1_epi8(15);
        __m256i sums[2];
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
            int32_t low, high;
            memcpy(&low, x + 4 * l, sizeof(low));
            memcpy(&high, x + 16 + 4 * l, sizeof(high));
            const __m256i low_input = _mm256_set1_epi32(low), high_input = _mm256_set1_epi32(high);
#pragma GCC unroll 2
            for (int part = 0; part < 2; ++part) {
                const __m256i line = in_order(load_codes(lines + 64 * l + 32 * part));  // or gcc would read it twice
                const __m256i first = _mm256_maddubs_epi16(_mm256_and_si256(line, mask), low_input);
                const __m256i second = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(line, 4), mask), high_input);
                sums[part] = in_order(l == 0 ? first : _mm256_add_epi16(sums[part], first));
                sums[part] = in_order(_mm256_add_epi16(sums[part], second));
            }
        }
        for (int part = 0; part < 2; ++part) out[part] = to_float(_mm256_madd_epi16(sums[part], _mm256_set1_epi16(1)));
    }

    static void quantize32(const float* x, float inverse, int8_t* codes, int32_t* low_sum, int32_t* high_sum) {
        __m256i q[4];
        for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(mul(load(x + 8 * i), broadcast(inverse)));
        *low_sum = sum_lanes(_mm256_add_epi32(q[0], q[1]));
        *high_sum = sum_lanes(_mm256_add_epi32(q[2], q[3]));
        // The packs work on each 128-bit half, so that dwords come out in the order 0 2 4 6 1 3 5 7.
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        store_codes(codes, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    }
    static float max_abs32(const float* x) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        __m256i best = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) best = _mm256_max_epu32(best, _mm256_and_si256(load_codes(x + 8 * i), magnitude));
        const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(best), _mm256_extracti128_si256(best, 1));
        const __m128i two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epu32(two, _mm_shuffle_epi32(two, 1))));
    }

    // Codes 0..15 of two blocks, and codes 16..31.
    struct Halves {
        Codes low, high;
    };
    static Halves two_nibbles(const uint8_t* a, const uint8_t* b) {
        const __m256i packed = _mm256_loadu2_m128i((const __m128i*)b, (const __m128i*)a), mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask)};
    }
    static Halves regroup(const int8_t* x) {
        const Codes a = load_codes(x), b = load_codes(x + 32);
        return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
    }

  private:
    static Sums dot_halves(Halves w, Halves x) {
        const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, x.low), _mm256_maddubs_epi16(w.high, x.high));
        return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    }
    // A token's four activations of a step, for all rows.
    static __m256i four(const int8_t* x) {
        int32_t codes;
        memcpy(&codes, x, sizeof(codes));
        return _mm256_set1_epi32(codes);
    }
    // Eight bytes, each to both halves of its lane.
    static __m256i bytes_twice(const uint8_t* p) {
        const __m256i zero_high = _mm256_set1_epi16((short)0x8000), row = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        int64_t bytes;
        memcpy(&bytes, p, sizeof(bytes));
        return _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), _mm256_or_si256(zero_high, _mm256_or_si256(row, _mm256_slli_epi32(row, 16))));
    }
    static int32_t load32(const uint8_t* p) {
        int32_t bits;
        memcpy(&bits, p, sizeof(bits));
        return bits;
    }
    // Byte i: all ones where it has bit i % 8.
    static __m256i spread_bits(__m256i bytes) {
        const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
        return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    }
    // Byte i: all ones where bit i is set.
    static __m256i bytes_with_bits(uint32_t bits) {
        const __m256i eighths = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        return spread_bits(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), eighths));
    }
    // Byte i: 16 where it has bit i % 8.
    static __m256i sixteens(__m256i bytes) { return _mm256_and_si256(spread_bits(bytes), _mm256_set1_epi8(16)); }
    static int32_t sum_lanes(__m256i v) {
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
    }
};

}  // namespace
}  // namespace moespan
