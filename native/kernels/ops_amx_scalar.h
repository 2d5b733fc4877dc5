// OpsAmxScalar: what the body of amx-inl.h asks for, in plain C++: AMX emulated, to test that body anywhere, and the documentation of OpsAmx.
#pragma once

#include "ops_scalar.h"

namespace moespan {
namespace {

struct OpsAmxScalar : OpsScalar {
    static Reg magnitude(Reg x) { return each([=](int i) { return bits_to_float(float_to_bits(x.lane[i]) & 0x7fffffff); }); }
    // floor(log2 |x|) of normal numbers.
    static Reg exponent(Reg x) {
        return each([=](int i) { return (float)((int)(float_to_bits(x.lane[i]) >> 23 & 255) - 127); });
    }

    // Half-precision floats, two for each row.
    struct Halves {
        uint16_t bits[2 * kLanes];
    };
    // Each number rounded to a half, twice.
    static Halves halves_twice(Reg x) {
        Halves h;
        for (int i = 0; i < 2 * kLanes; ++i) h.bits[i] = float_to_half(x.lane[i / 2]);
        return h;
    }
    // An integer of each row as halves, twice.
    template <class Byte>
    static Halves bytes_twice(const Byte* p) {
        return halves_twice(each([=](int i) { return (float)p[i]; }));
    }
    // Nibble 0 .. 3 of each 16 bits, times 2^-20.
    template <int nibble>
    static Halves nibbles_at(Step s) {
        Halves h;
        for (int i = 0; i < 2 * kLanes; ++i) h.bits[i] = (uint16_t)((s.byte[2 * i] | s.byte[2 * i + 1] << 8) >> 4 * nibble << 4 & 0xf0);
        return h;
    }
    // Codes 0 and 2, or 1 and 3, of each row's four.
    template <bool kSigned>
    static Halves even_codes(Step s) {
        return codes_at<kSigned>(s, 0);
    }
    template <bool kSigned>
    static Halves odd_codes(Step s) {
        return codes_at<kSigned>(s, 1);
    }
    static Halves mul_halves(Halves a, Halves b) {
        Halves h;
        for (int i = 0; i < 2 * kLanes; ++i) h.bits[i] = float_to_half(half(a.bits[i]) * half(b.bits[i]));
        return h;
    }
    // a * b + c: exact in double, and rounded once but for halves of halves of the last place.
    static Halves fma_halves(Halves a, Halves b, Halves c) {
        Halves h;
        for (int i = 0; i < 2 * kLanes; ++i) {
            h.bits[i] = float_to_half((float)((double)half(a.bits[i]) * half(b.bits[i]) + half(c.bits[i])));
        }
        return h;
    }
    // 2^-112 of each, rounded to bf16; inf and NaN become numbers.
    static void store_bf16(uint16_t* p, Halves h) {
        for (int i = 0; i < 2 * kLanes; ++i) p[i] = (uint16_t)((h.bits[i] & 0x8000) | ((uint16_t)(h.bits[i] + 4) >> 3 & 0x0fff));
    }
    // 2^64 of 32 columns, rounded as below.
    static void round_bf16(const float* x, uint16_t* out) {
        Reg columns[32 / kLanes];
        for (int v = 0; v < 32 / kLanes; ++v) columns[v] = mul(load(x + v * kLanes), broadcast(0x1p64f));
        round_columns(columns, out);
    }

    // 32 codes as floats.
    template <bool kSigned>
    static void floats_of(Codes c, Reg* out) {
        for (int v = 0; v < 32 / kLanes; ++v) {
            out[v] = each([&](int i) { return kSigned ? (float)(int8_t)c.byte[v * kLanes + i] : (float)c.byte[v * kLanes + i]; });
        }
    }
    // 32 columns as bf16, to the nearest, ties to even, in the order 0 2 1 3 of each four.
    static void round_columns(const Reg* x, uint16_t* out) {
        static constexpr int kFrom[4] = {0, 2, 1, 3};
        for (int i = 0; i < 32; ++i) {
            const int k = i / 4 * 4 + kFrom[i % 4];
            const uint32_t bits = float_to_bits(x[k / kLanes].lane[k % kLanes]);
            const bool nan = (bits & 0x7fffffff) > 0x7f800000;
            out[i] = (uint16_t)(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
    // Rows of 16 pairs, [16][16][2], turned: pair p of row r goes to place r of line p.
    static void turn_pairs(const uint16_t* rows, uint16_t* tile) {
        for (int r = 0; r < 16; ++r) {
            for (int p = 0; p < 16; ++p) memcpy(tile + 32 * p + 2 * r, rows + 32 * r + 2 * p, 2 * sizeof(uint16_t));
        }
    }

    // Registers of 16 rows of 64 bytes.
    struct TileRegisters {
        template <int t>
        void zero() {
            memset(tile[t], 0, sizeof(tile[t]));
        }
        template <int t>
        void load(const void* p) {
            memcpy(tile[t], p, sizeof(tile[t]));
        }
        template <int t>
        void load_sums(const float* p) {
            load<t>(p);
        }
        // c [m][n] += a [m][2 k] * b [k][2 n] + a [m][2 k + 1] * b [k][2 n + 1]: bf16 times bf16, sums of float32.
        template <int c, int a, int b>
        void multiply() {
            for (int m = 0; m < 16; ++m) {
                for (int n = 0; n < 16; ++n) {
                    float sum = bits_to_float(tile[c][m][n]);
                    for (int k = 0; k < 16; ++k) {
                        const uint32_t x = tile[a][m][k], w = tile[b][k][n];
                        sum += bits_to_float(x << 16) * bits_to_float(w << 16);
                        sum += bits_to_float(x & 0xffff0000) * bits_to_float(w & 0xffff0000);
                    }
                    tile[c][m][n] = float_to_bits(sum);
                }
            }
        }
        template <int t>
        void store(float* p) {
            memcpy(p, tile[t], sizeof(tile[t]));
        }

      private:
        uint32_t tile[8][16][16];
    };

  private:
    template <bool kSigned>
    static Halves codes_at(Step s, int odd) {
        Halves h;
        for (int i = 0; i < 2 * kLanes; ++i) {
            const uint8_t code = s.byte[2 * i + odd];
            h.bits[i] = float_to_half(kSigned ? (float)(int8_t)code : (float)code);
        }
        return h;
    }
};

}  // namespace
}  // namespace moespan
