// OpsBf16: what AMX and AVX512_BF16 have in common of the functions of OpsAmxScalar (ops_amx_scalar.h).
#pragma once

#include "ops_avx512.h"

namespace moespan {
namespace {

struct OpsBf16 : OpsAvx512 {
    static Reg magnitude(Reg x) { return _mm512_abs_ps(x); }
    static Reg exponent(Reg x) { return _mm512_getexp_ps(x); }
    static void round_bf16(const float* x, uint16_t* out) {
        const Reg power = broadcast(0x1p64f);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(mul(load(x + 16), power), mul(load(x), power));
        // 0 2 1 3 of each four: the middle two 16-bit numbers of each 64 bits change places
        const __m512i low = _mm512_shufflelo_epi16(both, (_MM_PERM_ENUM)0xd8);
        _mm512_store_si512(out, _mm512_shufflehi_epi16(low, (_MM_PERM_ENUM)0xd8));
    }
};

}  // namespace
}  // namespace moespan
