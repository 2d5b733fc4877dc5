// OpsAvx512Bf16: what the body of amx-inl.h asks for, on AVX-512 with BF16 and without AMX. The functions are those of OpsAmxScalar (ops_amx_scalar.h).
//
// There is no half-precision arithmetic here, so weights are opened in float32, and rounded once. A product of tiles is dpbf16: a pair of a token's columns,
// broadcast, times the pairs of 16 rows.
#pragma once

#include "ops_bf16.h"

namespace moespan {
namespace {

struct OpsAvx512Bf16 : OpsBf16 {
    // Both numbers of 16 rows.
    struct Halves {
        Reg first, second;
    };
    static Halves halves_twice(Reg x) { return {x, x}; }
    static Halves bytes_twice(const uint8_t* p) { return halves_twice(lanes_u8(p)); }
    static Halves bytes_twice(const int8_t* p) { return halves_twice(lanes_i8(p)); }
    template <int nibble>
    static Halves nibbles_at(Step s) {
        const __m512i mask = _mm512_set1_epi32(15);
        const Reg power = broadcast(0x1p-20f);
        return {mul(_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(s, 4 * nibble), mask)), power),
                mul(_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(s, 16 + 4 * nibble), mask)), power)};
    }
    template <bool kSigned>
    static Halves even_codes(Step s) {
        return {byte_of<0, kSigned>(s), byte_of<2, kSigned>(s)};
    }
    template <bool kSigned>
    static Halves odd_codes(Step s) {
        return {byte_of<1, kSigned>(s), byte_of<3, kSigned>(s)};
    }
    static Halves mul_halves(Halves a, Halves b) { return {mul(a.first, b.first), mul(a.second, b.second)}; }
    static Halves fma_halves(Halves a, Halves b, Halves c) { return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)}; }
    static void store_bf16(uint16_t* p, Halves h) {
        const Reg power = broadcast(0x1p-112f);
        const __m512i first = rounded(mul(h.first, power)), second = rounded(mul(h.second, power));
        _mm512_store_si512(p, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }

    // Sums are 16 registers' worth of memory in L1; operands stay where they lie.
    struct TileRegisters {
        template <int t>
        void zero() {
            for (int m = 0; m < 16; ++m) OpsAvx512::store(sums[t][m], OpsAvx512::zero());
        }
        template <int t>
        void load(const void* p) {
            operands[t] = (const uint8_t*)p;
        }
        template <int t>
        void load_sums(const float* p) {
            memcpy(sums[t], p, sizeof(sums[t]));
        }
        template <int c, int a, int b>
        void multiply() {
            const uint8_t *x = operands[a], *w = operands[b];
            __m512 sum[16];
#pragma GCC unroll 16
            for (int m = 0; m < 16; ++m) sum[m] = OpsAvx512::load(sums[c][m]);
            for (int k = 0; k < 16; ++k) {
                const __m512bh rows = (__m512bh)_mm512_load_si512(w + 64 * k);
#pragma GCC unroll 16
                for (int m = 0; m < 16; ++m) sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)four((const int8_t*)x + 64 * m + 4 * k), rows);
            }
#pragma GCC unroll 16
            for (int m = 0; m < 16; ++m) OpsAvx512::store(sums[c][m], sum[m]);
        }
        template <int t>
        void store(float* p) {
            memcpy(p, sums[t], sizeof(sums[t]));
        }

      private:
        alignas(64) float sums[8][16][16];
        const uint8_t* operands[8];
    };

  private:
    template <int byte, bool kSigned>
    static Reg byte_of(Step s) {
        const __m512i high = _mm512_slli_epi32(s, 24 - 8 * byte);
        return _mm512_cvtepi32_ps(kSigned ? _mm512_srai_epi32(high, 24) : _mm512_srli_epi32(high, 24));
    }
    // To bf16, in the low half of each lane.
    static __m512i rounded(Reg x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
};

}  // namespace
}  // namespace moespan
