// The K-quants: super-blocks of 256 values, whose scales are whole numbers times a half for the block. The interface is formats-inl.h's.
#pragma once

#include "formats-inl.h"

namespace moespan {
namespace {

template <class Ops>
struct Q2_K {
    using Block = BlockQ2_K;
    static constexpr uint32_t kType = kQ2_K;
    static constexpr int kBlock = 256, kGroup = 16, kMaxCode = 3;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::bits(((const Block*)span)->qs + 32 * (j / 4), 2 * (j % 4), 3); }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        using V8 = typename Ops::V8;
        const auto d = V8::broadcast(Ops::half(block.d)), minus_dmin = V8::broadcast(-Ops::half(block.dmin));
        const auto scale = [&](int i) { return V8::mul(Ops::template from_byte_fields<0>(block.scales + i), d); };
        const auto offset = [&](int i) { return V8::mul(Ops::template from_byte_fields<4>(block.scales + i), minus_dmin); };
        return {{scale(0), scale(8)}, {offset(0), offset(8)}};
    }
};

template <class Ops>
struct Q3_K {
    using Block = BlockQ3_K;
    static constexpr uint32_t kType = kQ3_K;
    static constexpr int kBlock = 256, kGroup = 16, kMaxCode = 7;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) {
        const Block& block = *(const Block*)span;
        return Ops::template or_bit<2>(Ops::bits(block.qs + 32 * (j / 4), 2 * (j % 4), 3), block.hmask, j);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        using V8 = typename Ops::V8;
        uint64_t low;  // words 0 and 1
        uint32_t high;
        memcpy(&low, block.scales, sizeof(low));
        memcpy(&high, block.scales + 8, sizeof(high));
        const auto d = V8::broadcast(Ops::half(block.d)), zero_point = V8::broadcast(-4.0f);
        const auto first = V8::mul(minus_32(low, high), d), second = V8::mul(minus_32(low >> 4, high >> 4), d);
        return {{first, second}, {V8::mul(first, zero_point), V8::mul(second, zero_point)}};
    }

  private:
    // Eight scales: low nibbles of the bytes of `low`; the low pairs of bits of high's bytes, then the next pairs.
    static typename Ops::V8::Reg minus_32(uint64_t low, uint32_t high) {
        const uint64_t pairs = (high & 0x03030303) | (uint64_t)(high >> 2 & 0x03030303) << 32;
        const auto scales = from_bytes<Ops>((low & 0x0f0f0f0f0f0f0f0f) | pairs << 4);
        return Ops::V8::sub(scales, Ops::V8::broadcast(32.0f));
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
        return Ops::template or_bit<4>(Ops::bits(block.qs + 32 * (j / 2), 4 * (j % 2), 15), block.qh, j);
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

}  // namespace
}  // namespace moespan
