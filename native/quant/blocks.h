// The GGUF block layouts, byte for byte as they lie in the file (little-endian; source: ggml's ggml-common.h and gguf's quants.py).
//
// A block's values are consecutive along a row. f16 is an IEEE half in a uint16_t. Plain structs only (see isa/kernels.h).
#pragma once

#include <stdint.h>

namespace moespan {

// ggml's type ids, as a GGUF's tensor table has them.
enum TypeId : uint32_t {
    kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8,
    kQ2_K = 10, kQ3_K = 11, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14,
    kIQ2_XXS = 16, kIQ2_XS = 17, kIQ3_XXS = 18, kIQ1_S = 19, kIQ4_NL = 20, kIQ3_S = 21, kIQ2_S = 22, kIQ4_XS = 23, kIQ1_M = 29,
    kBF16 = 30, kMXFP4 = 39,
};

// 32 values: d * (q - 8). Low nibbles are values 0..15, high nibbles values 16..31.
//   | d 2 | qs 16 |
struct BlockQ4_0 {
    uint16_t d;
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

// 32 values: d * q + m, nibbles as in Q4_0.
//   | d 2 | m 2 | qs 16 |
struct BlockQ4_1 {
    uint16_t d, m;
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

// 32 codes of 5 bits: bit i of qh is the high bit of code i; nibbles as in Q4_0.
struct FiveBits {
    uint8_t qh[4], qs[16];
};

// 32 values: d * (q - 16).
//   | d 2 | qh 4 | qs 16 |
struct BlockQ5_0 {
    uint16_t d;
    FiveBits q;
};
static_assert(sizeof(BlockQ5_0) == 22);

// 32 values: d * q + m.
//   | d 2 | m 2 | qh 4 | qs 16 |
struct BlockQ5_1 {
    uint16_t d, m;
    FiveBits q;
};
static_assert(sizeof(BlockQ5_1) == 24);

// 32 values: d * q, q signed.
//   | d 2 | qs 32 |
struct BlockQ8_0 {
    uint16_t d;
    int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// 32 values: d * values[q], 16 values (quant/grids.h); nibbles as in Q4_0.
//   | d 2 | qs 16 |
struct BlockIQ4_NL {
    uint16_t d;
    uint8_t qs[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18);

// The same with 2^(e - 128) for d (e 0 and 1 are not 0: they are the float32s below the normal ones).
//   | e 1 | qs 16 |
struct BlockMXFP4 {
    uint8_t e;
    uint8_t qs[16];
};
static_assert(sizeof(BlockMXFP4) == 17);

// 256 values in 16 groups of 16: d * scale[g] * q - dmin * min[g], q 2 bits, scale and min 4 bits each.
//   | scales 16 | qs 64 | d 2 | dmin 2 |
// scales[g]: low nibble scale, high nibble min. Each half (128 values: sub-blocks k = 0..3 of 32) has 32 bytes of qs; value l of sub-block k
// is qs[l] >> 2 * k.
struct BlockQ2_K {
    uint8_t scales[16];
    uint8_t qs[64];
    uint16_t d, dmin;
};
static_assert(sizeof(BlockQ2_K) == 84);

// 256 values in 16 groups of 16: d * (scale[g] - 32) * (q - 4), q 3 bits, scale 6 bits.
//   | hmask 32 | qs 64 | scales 12 | d 2 |
// Low 2 bits of q as in Q2_K; bit j of hmask[l] is the high bit of value l of sub-block j. scales, as three little-endian words (byte i of each):
//   word 0:  [lo4 of scale 8 + i  | lo4 of scale i]
//   word 1:  [lo4 of scale 12 + i | lo4 of scale 4 + i]
//   word 2:  [hi2 of scale 12 + i | 8 + i | 4 + i | i]
struct BlockQ3_K {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;
};
static_assert(sizeof(BlockQ3_K) == 110);

// 256 values in 8 sub-blocks of 32: d * scale[j] * q - dmin * min[j], scale and min 6 bits each.
//   | d 2 | dmin 2 | scales 12 | qs 128 |
// scales, as three little-endian words (j = 0..3 in the four bytes of each word):
//   word 0:             [hi2 of scale j+4 | scale j   (6)]
//   word 1:             [hi2 of min   j+4 | min j     (6)]
//   word 2:             [lo4 of min   j+4 | lo4 of scale j+4]
// qs: 32 bytes hold two sub-blocks: low nibbles are sub-block 2i, high nibbles sub-block 2i + 1.
struct BlockQ4_K {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

// As Q4_K, with codes of 5 bits: bit j of qh[l] is the high bit of value l of sub-block j.
//   | d 2 | dmin 2 | scales 12 | qh 32 | qs 128 |
struct BlockQ5_K {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

// 256 values in 16 groups of 16: d * scale[g] * (q - 32), q 6 bits, scale signed 8 bits.
//   | ql 128 | qh 64 | scales 16 | d 2 |
// Each half (128 values: sub-blocks k = 0..3 of 32) has 64 bytes of ql and 32 of qh; sub-block k, value l:
//   low 4 bits:  ql[32 * (k & 1) + l], low nibble for k = 0, 1 and high nibble for k = 2, 3
//   high 2 bits: qh[l] >> 2 * k
struct BlockQ6_K {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210);

// 256 values in 8 sub-blocks of 32, each as an IQ4_NL block with d * (scale[j] - 32) for d.
//   | d 2 | scales_h 2 | scales_l 4 | qs 128 |
// Low 4 bits of scale j: nibble j of scales_l; high 2 bits: scales_h >> 2 * j.
struct BlockIQ4_XS {
    uint16_t d, scales_h;
    uint8_t scales_l[4];
    uint8_t qs[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136);

// The IQ1, IQ2 and IQ3 types: 256 values in 8 sub-blocks of 32. A pick is the number of an entry of the type's grid (quant/grids.h), which is 8
// values, or 4 in IQ3; a sub-block is its picks in order. Where signs have 7 bits for 8 values, there is an even number of negative ones.

// d / 8 * (2 * scale + 1) * signed value.
//   | d 2 | 8 x (picks 4, signs and scale 4) |
// The last four bytes of a sub-block: four times 7 bits of signs, 4 bits of scale on top.
struct BlockIQ2_XXS {
    uint16_t d;
    uint8_t qs[64];
};
static_assert(sizeof(BlockIQ2_XXS) == 66);

// The same with a scale of 4 bits for each 16 values, low nibble first.
//   | d 2 | qs 64 | scales 8 |
// qs: 32 times 9 bits of pick, 7 bits of signs.
struct BlockIQ2_XS {
    uint16_t d, qs[32];
    uint8_t scales[8];
};
static_assert(sizeof(BlockIQ2_XS) == 74);

// The same with all signs, a bit each.
//   | d 2 | picks 32 | signs 32 | qh 8 | scales 8 |
// qh[j]: the high 2 bits of each of sub-block j's four picks.
struct BlockIQ2_S {
    uint16_t d;
    uint8_t qs[32], signs[32], qh[8], scales[8];
};
static_assert(sizeof(BlockIQ2_S) == 82);

// d / 4 * (2 * scale + 1) * signed value.
//   | d 2 | picks 64 | 8 x signs and scale 4, as in IQ2_XXS |
struct BlockIQ3_XXS {
    uint16_t d;
    uint8_t qs[64], signs_scales[32];
};
static_assert(sizeof(BlockIQ3_XXS) == 98);

// d * (2 * scale + 1) * signed value, a scale of 4 bits for each 32 values.
//   | d 2 | picks 64 | qh 8 | signs 32 | scales 4 |
// Bit k of qh[j]: the high bit of pick k of sub-block j.
struct BlockIQ3_S {
    uint16_t d;
    uint8_t qs[64], qh[8], signs[32], scales[4];
};
static_assert(sizeof(BlockIQ3_S) == 110);

// d * (2 * scale + 1) * (value + shift), value -1, 0 or 1, shift 1/8 or -1/8 for each 32 values.
//   | d 2 | picks 32 | qh 16 |
// qh[j]: the high 3 bits of each of sub-block j's four picks, 3 bits of scale, and a bit that makes the shift negative.
struct BlockIQ1_S {
    uint16_t d;
    uint8_t qs[32];
    uint16_t qh[8];
};
static_assert(sizeof(BlockIQ1_S) == 50);

// The same with a scale for each 16 values and a shift for each pick.
//   | picks 32 | qh 16 | scales 8 |
// A nibble of qh for each pick: its high 3 bits, and the shift's. scales, as four words of 16 bits: four times 3 bits of scale, and on top
// 4 bits of d, the lowest first.
struct BlockIQ1_M {
    uint8_t qs[32], qh[16];
    uint16_t scales[4];
};
static_assert(sizeof(BlockIQ1_M) == 56);

}  // namespace moespan
