// The GGUF block layouts, byte for byte as they lie in the file (little-endian; source: ggml's ggml-common.h and gguf's quants.py).
//
// A block's values are consecutive along a row. f16 is an IEEE half in a uint16_t. Plain structs only (see isa/kernels.h).
#pragma once

#include <stdint.h>

namespace moespan {

// ggml's type ids, as a GGUF's tensor table has them.
enum TypeId : uint32_t { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kBF16 = 30 };

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

}  // namespace moespan
