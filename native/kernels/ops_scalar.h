// OpsScalar: the integer side in plain C++, on top of VecScalar's floats. The reference for the other Ops, and their documentation.
//
// Every Ops type has these; V8 is the ISA's vector of 8 floats, for the 8 sub-blocks of a span (formats-inl.h).
#pragma once

#include <emmintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quant/blocks.h"
#include "quant/grids.h"
#include "vec_scalar.h"

namespace moespan {
namespace {

struct OpsScalar : VecScalar {
    using V8 = VecScalar;

    // 32 weight codes of 8 bits, or 32 activation codes.
    struct Codes {
        uint8_t byte[32];
    };
    // 32 products summed in fours: lanes 0..3 belong to codes 0..15, lanes 4..7 to codes 16..31.
    struct Sums {
        int32_t lane[8];
    };

    static float half(uint16_t bits) { return half_to_float(bits); }
    static Reg load_bf16(const uint16_t* p) { return each([=](int i) { return bits_to_float((uint32_t)p[i] << 16); }); }
    static void prefetch(const void*) {}      // into L1
    static void prefetch_far(const void*) {}  // into L2

    // --- codes from packed bytes ---
    static Codes load_codes(const void* p) {
        Codes c;
        memcpy(c.byte, p, sizeof(c.byte));
        return c;
    }
    static void store_codes(void* p, Codes c) { memcpy(p, c.byte, sizeof(c.byte)); }
    // 16 bytes: the low nibbles, then the high nibbles.
    static Codes nibbles(const uint8_t* p) {
        Codes c;
        for (int i = 0; i < 16; ++i) {
            c.byte[i] = p[i] & 15;
            c.byte[i + 16] = p[i] >> 4;
        }
        return c;
    }
    // The same with a fifth bit for each.
    static Codes five_bits(const FiveBits& q) {
        Codes c = nibbles(q.qs);
        for (int i = 0; i < 32; ++i) c.byte[i] |= (uint8_t)((q.qh[i / 8] >> i % 8 & 1) << 4);
        return c;
    }
    // 32 bytes: (byte >> shift) & mask.
    static Codes bits(const uint8_t* p, int shift, uint8_t mask) {
        Codes c;
        for (int i = 0; i < 32; ++i) c.byte[i] = (p[i] >> shift) & mask;
        return c;
    }
    // low | high << 4, where the high parts are below 16.
    static Codes or_high(Codes low, Codes high) {
        for (int i = 0; i < 32; ++i) low.byte[i] |= (uint8_t)(high.byte[i] << 4);
        return low;
    }

    // low with bit `to` set where the byte of p has bit `from`.
    template <int to>
    static Codes or_bit(Codes low, const uint8_t* p, int from) {
        for (int i = 0; i < 32; ++i) low.byte[i] |= (uint8_t)((p[i] >> from & 1) << to);
        return low;
    }
    // values[code] of codes below 16.
    static Codes lookup(Codes c, const int8_t* values) {
        for (uint8_t& code : c.byte) code = (uint8_t)values[code];
        return c;
    }

    // --- codes from a grid (quant/grids.h) ---
    // 8 words, `stride` bytes apart.
    template <size_t stride>
    static void load_words(const uint8_t* p, uint32_t* words) {
        for (int i = 0; i < 8; ++i) memcpy(words + i, p + i * stride, sizeof(words[i]));
    }
    // 16 picks: their low bytes, with the bits of `high` on top.
    template <PickBits place>
    static void join_picks(const uint8_t* low, const uint8_t* high, uint16_t* picks) {
        for (int i = 0; i < 16; ++i) {
            uint16_t unit = 0;
            memcpy(&unit, high + i / place.picks * place.unit_bytes, place.unit_bytes);
            picks[i] = (uint16_t)(low[i] | (unit >> i % place.picks * place.stride & ((1 << place.bits) - 1)) << 8);
        }
    }
    // 32 codes: the entries that four (or eight) picks name, one behind the other.
    template <class Entry, class Pick>
    static Codes pick(const Entry* grid, const Pick* picks) {
        Codes c;
        for (size_t i = 0; i < 32 / sizeof(Entry); ++i) memcpy(c.byte + i * sizeof(Entry), grid + picks[i], sizeof(Entry));
        return c;
    }
    // -code where bit i is set.
    static Codes negate(Codes c, uint32_t bits) {
        for (int i = 0; i < 32; ++i) c.byte[i] = (uint8_t)((bits >> i & 1) ? -c.byte[i] : c.byte[i]);
        return c;
    }
    // addends[i / 8] added to code i.
    static Codes add_to_eights(Codes c, const uint8_t* addends) {
        for (int i = 0; i < 32; ++i) c.byte[i] += addends[i / 8];
        return c;
    }

    // --- scales of a span ---
    // The two halves at p, at p + stride, ...: of each of `count` blocks, zeros in the other lanes.
    struct HalfPairs {
        V8::Reg first, second;
    };
    template <size_t stride>
    static HalfPairs gather_halves(const uint8_t* p, int count) {
        const auto at = [=](int i, int which) {
            uint16_t bits = 0;
            if (i < count) memcpy(&bits, p + i * stride + 2 * which, sizeof(bits));
            return half(bits);
        };
        return {V8::each([=](int i) { return at(i, 0); }), V8::each([=](int i) { return at(i, 1); })};
    }
    // 2^(e - 128) of the byte e at p, at p + stride, ...: as gather_halves.
    template <size_t stride>
    static V8::Reg gather_powers(const uint8_t* p, int count) {
        return V8::each([=](int i) {
            const uint32_t e = i < count ? p[i * stride] : 0;
            return i < count ? bits_to_float(e < 2 ? 0x00200000u << e : (e - 1) << 23) : 0.0f;
        });
    }
    static V8::Reg from_u8(const uint8_t* p) { return V8::each([=](int i) { return (float)p[i]; }); }
    static V8::Reg from_i8(const int8_t* p) { return V8::each([=](int i) { return (float)p[i]; }); }
    // Four bits of each of 8 bytes.
    template <int shift>
    static V8::Reg from_byte_fields(const uint8_t* p) {
        return V8::each([=](int i) { return (float)(p[i] >> shift & 15); });
    }
    // The eight fields of so many bits, the lowest first.
    template <int bits>
    static V8::Reg from_fields(uint32_t word) {
        return V8::each([=](int i) { return (float)(word >> bits * i & ((1 << bits) - 1)); });
    }
    // (v0 v0 v1 v1 v2 v2 v3 v3) and (v4 v4 ... v7 v7): a scale of each 32 values for each 16.
    static V8::Reg twice_low(V8::Reg v) { return V8::each([=](int i) { return v.lane[i / 2]; }); }
    static V8::Reg twice_high(V8::Reg v) { return V8::each([=](int i) { return v.lane[4 + i / 2]; }); }
    // (p0 p0 p0 p0 p1 p1 p1 p1): the scales of both halves of a Sums.
    static V8::Reg pair(const float* p) { return V8::each([=](int i) { return p[i / 4]; }); }

    // --- dot products ---
    static Sums dot_unsigned(Codes w, Codes x) {
        Sums s = {};
        for (int i = 0; i < 32; ++i) s.lane[i / 4] += (int)w.byte[i] * (int8_t)x.byte[i];
        return s;
    }
    static Sums dot_signed(Codes w, Codes x) {
        Sums s = {};
        for (int i = 0; i < 32; ++i) s.lane[i / 4] += (int)(int8_t)w.byte[i] * (int8_t)x.byte[i];
        return s;
    }
    // Two blocks of 32 codes times x's 64: lanes 0..3 belong to block a, lanes 4..7 to block b.
    static Sums dot_two_nibbles(const uint8_t* a, const uint8_t* b, const int8_t* x) { return dot_two(nibbles(a), nibbles(b), x); }
    static Sums dot_two_five_bits(const FiveBits& a, const FiveBits& b, const int8_t* x) { return dot_two(five_bits(a), five_bits(b), x); }
    static Sums dot_two_values(const uint8_t* a, const uint8_t* b, const int8_t* values, const int8_t* x) {
        return dot_two<int8_t>(lookup(nibbles(a), values), lookup(nibbles(b), values), x);
    }
    template <class Code = uint8_t>
    static Sums dot_two(Codes a, Codes b, const int8_t* x) {
        const Codes w[2] = {a, b};
        Sums s = {};
        for (int i = 0; i < 64; ++i) s.lane[i / 32 * 4 + i % 4] += (int)(Code)w[i / 32].byte[i % 32] * x[i];
        return s;
    }
    static V8::Reg to_float(Sums s) { return V8::each([&](int i) { return (float)s.lane[i]; }); }

    // --- panels (gemm-inl.h): kLanes rows side by side, four codes of each in turn ---
    static constexpr int kTokens = 4;  // tokens that a micro-kernel works on at once

    // Eight rows' 32 codes: step i (codes 4i .. 4i + 3 of each row) goes to dst + i * stride.
    static void store_transposed(const Codes* rows, uint8_t* dst, size_t stride) {
        for (int i = 0; i < 8; ++i) {
            for (int r = 0; r < 8; ++r) memcpy(dst + i * stride + 4 * r, rows[r].byte + 4 * i, 4);
        }
    }
    // out[t], lane r: the sum over `steps` steps of w (panel row r) times x[t]; unsigned codes up to kMax, or signed ones.
    template <int T, int steps, bool kSigned, int kMax>
    static void dot_panel(const uint8_t* w, const int8_t* const* x, Reg* out) {
        for (int t = 0; t < T; ++t) {
            out[t] = each([=](int r) {
                int32_t sum = 0;
                for (int i = 0; i < 4 * steps; ++i) {
                    const uint8_t code = w[i / 4 * 4 * kLanes + 4 * r + i % 4];
                    sum += (kSigned ? (int)(int8_t)code : (int)code) * x[t][i];
                }
                return (float)sum;
            });
        }
    }

    // --- tile order (tiles-inl.h): steps of kLanes rows x 4 codes ---
    static constexpr int kStripTokens = 4;  // tokens that gemv works on at once
    struct Step {
        uint8_t byte[4 * kLanes];
    };
    static Step load_step(const uint8_t* p) {
        Step s;
        memcpy(s.byte, p, sizeof(s.byte));
        return s;
    }
    static void store_step(uint8_t* p, Step s) { memcpy(p, s.byte, sizeof(s.byte)); }
    // (byte >> shift) & mask; a negative shift goes left.
    template <int shift, int mask>
    static Step field(Step s) {
        for (uint8_t& b : s.byte) b = (uint8_t)((shift < 0 ? b << (shift < 0 ? -shift : 0) : b >> (shift < 0 ? 0 : shift)) & mask);
        return s;
    }
    static Step or_step(Step a, Step b) {
        for (int i = 0; i < 4 * kLanes; ++i) a.byte[i] |= b.byte[i];
        return a;
    }
    // values[byte] for bytes below 16; values is aligned to 16.
    static Step lookup_step(Step s, const int8_t* values) {
        for (uint8_t& b : s.byte) b = (uint8_t)values[b];
        return s;
    }
    static Reg lanes_u8(const uint8_t* p) { return each([=](int i) { return (float)p[i]; }); }
    static Reg lanes_i8(const int8_t* p) { return each([=](int i) { return (float)p[i]; }); }
    // As dot_panel, of steps in registers and one token.
    template <int steps, bool kSigned, int kMax>
    static Reg dot_steps(const Step* w, const int8_t* x) {
        return each([=](int r) {
            int32_t sum = 0;
            for (int i = 0; i < 4 * steps; ++i) {
                const uint8_t code = w[i / 4].byte[4 * r + i % 4];
                sum += (kSigned ? (int)(int8_t)code : (int)code) * x[i];
            }
            return (float)sum;
        });
    }

    // --- scales that are whole numbers (whole-inl.h) ---
    // A whole number in each lane. As factors they may lie in another way, each Ops' own: what low_nibbles gives, and only add_scaled_* take.
    struct Ints {
        int32_t lane[kLanes];
    };
    static Ints no_ints() { return {}; }
    static Ints load_ints(const float* p) {
        Ints n;
        memcpy(&n, p, sizeof(n));
        return n;
    }
    static void store_ints(float* p, Ints n) { memcpy(p, &n, sizeof(n)); }
    static Reg floats(Ints n) { return each([&](int r) { return (float)n.lane[r]; }); }
    // Of kLanes bytes: factors up to 15, and the other halves as floats.
    static Ints low_nibbles(const uint8_t* p) {
        Ints n;
        for (int r = 0; r < kLanes; ++r) n.lane[r] = p[r] & 15;
        return n;
    }
    static Reg high_nibbles(const uint8_t* p) { return each([=](int r) { return (float)(p[r] >> 4); }); }
    // sum + factor * (the products of `steps` steps with x), of unsigned codes up to kMax.
    template <int steps, int kMax>
    static Ints add_scaled_steps(const Step* w, const int8_t* x, Ints factor, Ints sum) {
        for (int i = 0; i < steps; ++i) add_scaled(w[i].byte, x + 4 * i, factor, sum);
        return sum;
    }
    // The same of a panel, for T tokens.
    template <int T, int steps, int kMax>
    static void add_scaled_panel(const uint8_t* w, const int8_t* const* x, Ints factor, Ints* sums) {
        for (int t = 0; t < T; ++t) {
            for (int i = 0; i < steps; ++i) add_scaled(w + i * 4 * kLanes, x[t] + 4 * i, factor, sums[t]);
        }
    }
    static void add_scaled(const uint8_t* step, const int8_t* x, Ints factor, Ints& sum) {
        for (int i = 0; i < 4 * kLanes; ++i) sum.lane[i / 4] += factor.lane[i / 4] * (int)step[i] * x[i % 4];
    }

    // --- activations to int8 ---
    // codes[i] = x[i] * inverse, to the nearest integer, ties to even; the sums of the first and the last 16 codes.
    static void quantize32(const float* x, float inverse, int8_t* codes, int32_t* low_sum, int32_t* high_sum) {
        int32_t sums[2] = {0, 0};
        for (int i = 0; i < 32; ++i) {
            const int q = _mm_cvtss_si32(_mm_set_ss(x[i] * inverse));
            codes[i] = (int8_t)q;
            sums[i / 16] += q;
        }
        *low_sum = sums[0];
        *high_sum = sums[1];
    }
    // The largest magnitude, compared as bits: those order as the numbers do, with inf and then NaN on top, so neither is lost.
    static float max_abs32(const float* x) {
        uint32_t best = 0;
        for (int i = 0; i < 32; ++i) {
            const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffff;
            best = magnitude > best ? magnitude : best;
        }
        return bits_to_float(best);
    }
};

}  // namespace
}  // namespace moespan
