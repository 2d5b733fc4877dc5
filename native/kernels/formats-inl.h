// The weight formats, each one small struct over an Ops type: what a kernel must know to read it.
//
// A row is read in spans of 256 values = 8 sub-blocks of 32: one super-block of a K-quant, or 8 blocks of a simple format (the last span
// of a row may be shorter then). A quantised format says
//   codes(span, j)             the 32 codes of sub-block j
//   scales(span, count)        scale and offset of each group: value = scale * code + offset
//   dot_two(span, j, x)        optional: the products of sub-blocks j and j + 1 in one, when that is cheaper
// with a group of kGroup = 32 or 16 values. `count` is the number of sub-blocks that are there; the lanes of the others are 0.
// Codes are unsigned up to kMaxCode, or signed. To add a format: its block in quant/blocks.h, a struct here, a line in table-inl.h.
#pragma once

#include "quant/blocks.h"

namespace moespan {
namespace {

constexpr int kSubBlock = 32, kSpanSubs = 8, kSpan = kSubBlock * kSpanSubs;

// Scales and offsets of a span's groups: vector 0 has the 8 of a span with kGroup = 32, or the first 8 of the 16 with kGroup = 16.
template <class Ops, int kGroup>
struct Scales {
    static constexpr int kVectors = kSubBlock / kGroup;
    typename Ops::V8::Reg scale[kVectors], offset[kVectors];
};

// The first two halves of each of `count` consecutive blocks of `block_bytes`; a partial span may end where the file does.
template <class Ops, size_t block_bytes>
inline typename Ops::HalfPairs block_halves(const uint8_t* span, int count) {
    if (count == kSpanSubs) return Ops::template gather_halves<block_bytes>(span, kSpanSubs);
    return Ops::template gather_halves<block_bytes>(span, count);
}

template <class Ops>
struct Q4_0 {
    using Block = BlockQ4_0;
    static constexpr uint32_t kType = kQ4_0;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 15;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::nibbles(((const Block*)span)[j].qs); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_nibbles(((const Block*)span)[j].qs, ((const Block*)span)[j + 1].qs, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto d = block_halves<Ops, sizeof(Block)>(span, count).first;
        return {{d}, {Ops::V8::mul(d, Ops::V8::broadcast(-8.0f))}};
    }
};

template <class Ops>
struct Q4_1 {
    using Block = BlockQ4_1;
    static constexpr uint32_t kType = kQ4_1;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 15;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::nibbles(((const Block*)span)[j].qs); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_nibbles(((const Block*)span)[j].qs, ((const Block*)span)[j + 1].qs, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto [d, m] = block_halves<Ops, sizeof(Block)>(span, count);
        return {{d}, {m}};
    }
};

template <class Ops>
struct Q5_0 {
    using Block = BlockQ5_0;
    static constexpr uint32_t kType = kQ5_0;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 31;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::five_bits(((const Block*)span)[j].q); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_five_bits(((const Block*)span)[j].q, ((const Block*)span)[j + 1].q, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto d = block_halves<Ops, sizeof(Block)>(span, count).first;
        return {{d}, {Ops::V8::mul(d, Ops::V8::broadcast(-16.0f))}};
    }
};

template <class Ops>
struct Q5_1 {
    using Block = BlockQ5_1;
    static constexpr uint32_t kType = kQ5_1;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 31;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::five_bits(((const Block*)span)[j].q); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_five_bits(((const Block*)span)[j].q, ((const Block*)span)[j + 1].q, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto [d, m] = block_halves<Ops, sizeof(Block)>(span, count);
        return {{d}, {m}};
    }
};

template <class Ops>
struct Q8_0 {
    using Block = BlockQ8_0;
    static constexpr uint32_t kType = kQ8_0;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 128;
    static constexpr bool kSigned = true, kOffset = false;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::load_codes(((const Block*)span)[j].qs); }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        return {{block_halves<Ops, sizeof(Block)>(span, count).first}, {Ops::V8::zero()}};
    }
};

// The scales of Q4_K and Q5_K: 6 bits each for scale and minimum, packed as blocks.h says.
template <class Ops, class Block>
inline Scales<Ops, 32> packed_scales(const Block& block) {
    uint32_t packed[3], scale[2], min[2];
    memcpy(packed, block.scales, sizeof(packed));
    scale[0] = packed[0] & 0x3f3f3f3f;
    scale[1] = (packed[2] & 0x0f0f0f0f) | (packed[0] >> 2 & 0x30303030);
    min[0] = packed[1] & 0x3f3f3f3f;
    min[1] = (packed[2] >> 4 & 0x0f0f0f0f) | (packed[1] >> 2 & 0x30303030);
    using V8 = typename Ops::V8;
    return {{V8::mul(Ops::from_u8((const uint8_t*)scale), V8::broadcast(Ops::half(block.d)))},
            {V8::mul(Ops::from_u8((const uint8_t*)min), V8::broadcast(-Ops::half(block.dmin)))}};
}

template <class Ops>
struct Q4_K {
    using Block = BlockQ4_K;
    static constexpr uint32_t kType = kQ4_K;
    static constexpr int kBlock = 256, kGroup = 32, kMaxCode = 15;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::bits(((const Block*)span)->qs + 32 * (j / 2), 4 * (j % 2), 15); }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) { return packed_scales<Ops>(*(const Block*)span); }
};

template <class Ops>
struct Q5_K {
    using Block = BlockQ5_K;
    static constexpr uint32_t kType = kQ5_K;
    static constexpr int kBlock = 256, kGroup = 32, kMaxCode = 31;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) {
        const Block& block = *(const Block*)span;
        return Ops::or_fifth(Ops::bits(block.qs + 32 * (j / 2), 4 * (j % 2), 15), block.qh, j);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) { return packed_scales<Ops>(*(const Block*)span); }
};

template <class Ops>
struct Q6_K {
    using Block = BlockQ6_K;
    static constexpr uint32_t kType = kQ6_K;
    static constexpr int kBlock = 256, kGroup = 16, kMaxCode = 63;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) {
        const Block& block = *(const Block*)span;
        const int half = j / 4, k = j % 4;
        const auto low = Ops::bits(block.ql + 64 * half + 32 * (k % 2), 4 * (k / 2), 15);
        return Ops::or_high(low, Ops::bits(block.qh + 32 * half, 2 * k, 3));
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        using V8 = typename Ops::V8;
        const auto d = V8::broadcast(Ops::half(block.d)), zero_point = V8::broadcast(-32.0f);
        const auto low = V8::mul(Ops::from_i8(block.scales), d), high = V8::mul(Ops::from_i8(block.scales + 8), d);
        return {{low, high}, {V8::mul(low, zero_point), V8::mul(high, zero_point)}};
    }
};

// A float format says how to load a vector of its elements as floats.
template <class Ops>
struct F32 {
    using Element = float;
    static constexpr uint32_t kType = kF32;
    static typename Ops::Reg load(const Element* p) { return Ops::load(p); }
};

template <class Ops>
struct F16 {
    using Element = uint16_t;
    static constexpr uint32_t kType = kF16;
    static typename Ops::Reg load(const Element* p) { return Ops::load_half(p); }
};

template <class Ops>
struct BF16 {
    using Element = uint16_t;
    static constexpr uint32_t kType = kBF16;
    static typename Ops::Reg load(const Element* p) { return Ops::load_bf16(p); }
};

}  // namespace
}  // namespace moespan
