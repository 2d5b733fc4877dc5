// OpsAmx: AVX-512 with half-precision arithmetic (AVX512-FP16), bf16 conversion and AMX tiles. The functions are those of OpsAmxScalar (ops_amx_scalar.h).
#pragma once

#include "ops_bf16.h"

namespace moespan {
namespace {

struct OpsAmx : OpsBf16 {
    using Halves = __m512h;
    static Halves halves_twice(Reg x) {
        const __m512i once = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        return (__m512h)_mm512_or_si512(once, _mm512_slli_epi32(once, 16));
    }
    static Halves bytes_twice(const uint8_t* p) { return _mm512_cvtepu16_ph(spread_bytes(p)); }
    static Halves bytes_twice(const int8_t* p) {
        const __m512i low = spread_bytes((const uint8_t*)p);
        return _mm512_cvtepi16_ph(_mm512_srai_epi16(_mm512_slli_epi16(low, 8), 8));
    }
    template <int nibble>
    static Halves nibbles_at(Step s) {
        const __m512i moved = nibble == 0 ? _mm512_slli_epi16(s, 4) : nibble == 1 ? s : _mm512_srli_epi16(s, nibble == 2 ? 4 : 8);
        return (__m512h)_mm512_and_si512(moved, _mm512_set1_epi16(0xf0));
    }
    template <bool kSigned>
    static Halves even_codes(Step s) {
        return _mm512_cvtepi16_ph(kSigned ? _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8) : _mm512_and_si512(s, _mm512_set1_epi16(0xff)));
    }
    template <bool kSigned>
    static Halves odd_codes(Step s) {
        return _mm512_cvtepi16_ph(kSigned ? _mm512_srai_epi16(s, 8) : _mm512_srli_epi16(s, 8));
    }
    static Halves mul_halves(Halves a, Halves b) { return _mm512_mul_ph(a, b); }
    static Halves fma_halves(Halves a, Halves b, Halves c) { return _mm512_fmadd_ph(a, b, c); }
    static void store_bf16(uint16_t* p, Halves h) {
        const __m512i shifted = _mm512_mulhrs_epi16((__m512i)h, _mm512_set1_epi16(1 << 12));  // (h + 4) >> 3 in one instruction
        _mm512_store_si512(p, _mm512_and_si512(shifted, _mm512_set1_epi16((short)0x8fff)));
    }

    // Eight tile registers of 16 rows of 64 bytes. The state belongs to the thread; released, it costs a context switch nothing.
    struct TileRegisters {
        TileRegisters() {
            struct alignas(64) Config {
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } config;
            __asm__ volatile("ldtilecfg %0" ::"m"(config));
        }
        ~TileRegisters() { __asm__ volatile("tilerelease" ::); }
        TileRegisters(const TileRegisters&) = delete;
        TileRegisters& operator=(const TileRegisters&) = delete;

        template <int t>
        void zero() {
            __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
        }
        template <int t>
        void load(const void* p) {
            __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"((size_t)64) : "memory");
        }
        template <int t>
        void load_sums(const float* p) {
            load<t>(p);
        }
        template <int c, int a, int b>
        void multiply() {
            __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
        }
        template <int t>
        void store(float* p) {
            __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"((size_t)64) : "memory");
        }
    };

  private:
    // 16 bytes, each to two lanes of 16 bits.
    static __m512i spread_bytes(const uint8_t* p) {
        const __m512i four_times = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
        const __m512i zero_high = _mm512_set1_epi16((short)0x8000), row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i twice = _mm512_or_si512(row, _mm512_slli_epi32(row, 16));
        return _mm512_shuffle_epi8(four_times, _mm512_or_si512(zero_high, twice));
    }
};

}  // namespace
}  // namespace moespan
