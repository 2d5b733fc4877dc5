// OpsBf16: what AMX and AVX512_BF16 have in common of the functions of OpsAmxScalar (ops_amx_scalar.h).
#pragma once

#include "ops_avx512.h"

namespace moespan {
namespace {

struct OpsBf16 : OpsAvx512 {
    static Reg magnitude(Reg x) { return _mm512_abs_ps(x); }
    static Reg exponent(Reg x) { return _mm512_getexp_ps(x); }
    static void round_bf16(const float* x, uint16_t* out) {
        const Reg power = broadcast(0x1p64f), columns[2] = {mul(load(x), power), mul(load(x + 16), power)};
        round_columns(columns, out);
    }

    template <bool kSigned>
    static void floats_of(Codes c, Reg* out) {
        const auto widen = [](__m128i bytes) { return _mm512_cvtepi32_ps(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes)); };
        out[0] = widen(_mm256_castsi256_si128(c));
        out[1] = widen(_mm256_extracti128_si256(c, 1));
    }
    static void round_columns(const Reg* x, uint16_t* out) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
        // 0 2 1 3 of each four: the middle two 16-bit numbers of each 64 bits change places
        const __m512i low = _mm512_shufflelo_epi16(both, (_MM_PERM_ENUM)0xd8);
        _mm512_store_si512(out, _mm512_shufflehi_epi16(low, (_MM_PERM_ENUM)0xd8));
    }
    static void turn_pairs(const uint16_t* rows, uint16_t* tile) {
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; ++quarter) {  // pairs 4 * quarter .. + 3: fours[i] has those of rows i, i + 4, i + 8 and i + 12
            __m512i fours[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const auto at = [=](int r) { return _mm_load_si128((const __m128i*)(rows + 32 * r + 8 * quarter)); };
                const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(at(4 * 0 + i)), at(4 * 1 + i), 1);
                fours[i] = _mm512_inserti32x4(_mm512_inserti32x4(two, at(4 * 2 + i), 2), at(4 * 3 + i), 3);
            }
            const __m512i low_a = _mm512_unpacklo_epi32(fours[0], fours[1]), high_a = _mm512_unpackhi_epi32(fours[0], fours[1]);
            const __m512i low_b = _mm512_unpacklo_epi32(fours[2], fours[3]), high_b = _mm512_unpackhi_epi32(fours[2], fours[3]);
            uint16_t* line = tile + 4 * 32 * quarter;
            _mm512_store_si512(line, _mm512_unpacklo_epi64(low_a, low_b));
            _mm512_store_si512(line + 32, _mm512_unpackhi_epi64(low_a, low_b));
            _mm512_store_si512(line + 64, _mm512_unpacklo_epi64(high_a, high_b));
            _mm512_store_si512(line + 96, _mm512_unpackhi_epi64(high_a, high_b));
        }
    }
};

}  // namespace
}  // namespace moespan
