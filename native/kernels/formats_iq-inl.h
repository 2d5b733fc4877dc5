// The IQ types: blocks of 256 values, whose codes are looked up. IQ4_XS has a table of 16 values; the others pick entries of 8 or 4 values
// from a grid (quant/grids.h). The interface is formats-inl.h's; the layouts are spelled out in quant/blocks.h.
#pragma once

#include "formats-inl.h"

namespace moespan {
namespace {

template <class Ops>
struct IQ4_XS {
    using Block = BlockIQ4_XS;
    static constexpr uint32_t kType = kIQ4_XS;
    static constexpr int kBlock = 256, kGroup = 32, kMaxCode = 127;
    static constexpr bool kSigned = true, kOffset = false;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::lookup(Ops::nibbles(((const Block*)span)->qs + 16 * j), kValuesIQ4.entries); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        const uint8_t* qs = ((const Block*)span)->qs + 16 * j;
        return Ops::dot_two_values(qs, qs + 16, kValuesIQ4.entries, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        using V8 = typename Ops::V8;
        const auto low = V8::sub(Ops::template from_fields<4>(load_word(block.scales_l)), V8::broadcast(32.0f));
        const auto scale = V8::fma(Ops::template from_fields<2>(block.scales_h), V8::broadcast(16.0f), low);
        return {{V8::mul(scale, V8::broadcast(Ops::half(block.d)))}, {V8::zero()}};
    }
};

// --- grids: what a span is opened to ---

// Picks that are bytes, eight bytes after each other for each sub-block; and bit i of negative[j]: the sign of sub-block j's value i.
struct PicksInPlace {
    const uint8_t* first;
    uint32_t negative[kSpanSubs];
    const uint8_t* picks(int j) const { return first + 8 * j; }
};

template <int count>
struct Picks {
    uint16_t pick[count];
    const uint16_t* picks(int j) const { return pick + count / kSpanSubs * j; }
};

template <int count>
struct SignedPicks : Picks<count> {
    uint32_t negative[kSpanSubs];
};

// The eighth sign of each seven: that which makes the number of negative ones even.
template <class Word>
inline Word with_eighth_signs(Word sevens) {
    Word parity = sevens ^ sevens >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return (Word)(sevens | (parity & (Word)0x01010101) << 7);
}

// The signs of the XXS types: 4 x 7 bits, in the 8 words that lie `stride` apart.
template <class Ops, size_t stride>
inline void xxs_signs(const uint8_t* p, uint32_t* negative) {
    uint32_t words[kSpanSubs];
    Ops::template load_words<stride>(p, words);
    for (int j = 0; j < kSpanSubs; ++j) {
        const uint32_t fourteens = (words[j] & 0x00003fff) | (words[j] << 2 & 0x3fff0000);
        negative[j] = with_eighth_signs<uint32_t>((fourteens & 0x007f007f) | (fourteens << 1 & 0x7f007f00));
    }
}

// 2 * scale + 1 of the 8 words that lie `stride` apart: their top 4 bits are the scale.
template <class Ops, size_t stride>
inline typename Ops::V8::Reg xxs_scales(const uint8_t* p) {
    uint32_t words[kSpanSubs];
    Ops::template load_words<stride>(p, words);
    float odd[kSpanSubs];
    for (int j = 0; j < kSpanSubs; ++j) odd[j] = (float)(int)((words[j] >> 28 << 1) | 1);
    return Ops::V8::load(odd);
}

// What the formats with magnitudes in a grid and signs apart have in common.
template <class Ops, const auto& grid, int kLargest>
struct SignedGrid {
    static constexpr int kBlock = 256, kMaxCode = kLargest;
    static constexpr bool kSigned = true, kOffset = false;

    template <class Opened>
    static typename Ops::Codes codes(const Opened& opened, int j) {
        return Ops::negate(Ops::pick(grid.entries, opened.picks(j)), opened.negative[j]);
    }
    template <class Opened>
    static typename Ops::Sums dot(const Opened& opened, int j, typename Ops::Codes x) {
        return Ops::dot_unsigned(Ops::pick(grid.entries, opened.picks(j)), Ops::negate(x, opened.negative[j]));
    }
};

template <class Ops>
struct IQ2_XXS : SignedGrid<Ops, kGridIQ2_XXS, 43> {
    using Block = BlockIQ2_XXS;
    using Opened = PicksInPlace;
    static constexpr uint32_t kType = kIQ2_XXS;
    static constexpr int kGroup = 32;

    static void open(const uint8_t* span, Opened& opened) {
        opened.first = ((const Block*)span)->qs;
        xxs_signs<Ops, 8>(opened.first + 4, opened.negative);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        return {{Ops::V8::mul(xxs_scales<Ops, 8>(block.qs + 4), Ops::V8::broadcast(0.125f * Ops::half(block.d)))}, {Ops::V8::zero()}};
    }
};

// d / 8 * (2 * scale + 1) for 16 scales of 4 bits.
template <class Ops>
inline Scales<Ops, 16> nibble_scales(uint16_t d, const uint8_t* nibbles) {
    using V8 = typename Ops::V8;
    const float quarter = 0.25f * Ops::half(d);
    const auto unit = V8::broadcast(quarter), half_unit = V8::broadcast(0.5f * quarter);
    return {{V8::fma(Ops::template from_fields<4>(load_word(nibbles)), unit, half_unit),
             V8::fma(Ops::template from_fields<4>(load_word(nibbles + 4)), unit, half_unit)},
            {V8::zero(), V8::zero()}};
}

template <class Ops>
struct IQ2_XS : SignedGrid<Ops, kGridIQ2_XS, 43> {
    using Block = BlockIQ2_XS;
    using Opened = SignedPicks<32>;
    static constexpr uint32_t kType = kIQ2_XS;
    static constexpr int kGroup = 16;

    static void open(const uint8_t* span, Opened& opened) {
        const Block& block = *(const Block*)span;
        uint8_t* signs = (uint8_t*)opened.negative;
        for (int i = 0; i < 32; ++i) opened.pick[i] = block.qs[i] & 511;
        for (int i = 0; i < 32; ++i) signs[i] = (uint8_t)with_eighth_signs<uint16_t>(block.qs[i] >> 9);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) { return nibble_scales<Ops>(((const Block*)span)->d, ((const Block*)span)->scales); }
};

template <class Ops>
struct IQ2_S : SignedGrid<Ops, kGridIQ2_S, 43> {
    using Block = BlockIQ2_S;
    using Opened = SignedPicks<32>;
    static constexpr uint32_t kType = kIQ2_S;
    static constexpr int kGroup = 16;

    static void open(const uint8_t* span, Opened& opened) {
        const Block& block = *(const Block*)span;
        for (int i = 0; i < 2; ++i) Ops::template join_picks<PickBits{1, 4, 2, 2}>(block.qs + 16 * i, block.qh + 4 * i, opened.pick + 16 * i);
        memcpy(opened.negative, block.signs, sizeof(block.signs));
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) { return nibble_scales<Ops>(((const Block*)span)->d, ((const Block*)span)->scales); }
};

template <class Ops>
struct IQ3_XXS : SignedGrid<Ops, kGridIQ3_XXS, 62> {
    using Block = BlockIQ3_XXS;
    using Opened = PicksInPlace;
    static constexpr uint32_t kType = kIQ3_XXS;
    static constexpr int kGroup = 32;

    static void open(const uint8_t* span, Opened& opened) {
        opened.first = ((const Block*)span)->qs;
        xxs_signs<Ops, 4>(((const Block*)span)->signs_scales, opened.negative);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        return {{Ops::V8::mul(xxs_scales<Ops, 4>(block.signs_scales), Ops::V8::broadcast(0.25f * Ops::half(block.d)))}, {Ops::V8::zero()}};
    }
};

template <class Ops>
struct IQ3_S : SignedGrid<Ops, kGridIQ3_S, 15> {
    using Block = BlockIQ3_S;
    using Opened = SignedPicks<64>;
    static constexpr uint32_t kType = kIQ3_S;
    static constexpr int kGroup = 32;

    static void open(const uint8_t* span, Opened& opened) {
        const Block& block = *(const Block*)span;
        for (int i = 0; i < 4; ++i) Ops::template join_picks<PickBits{1, 8, 1, 1}>(block.qs + 16 * i, block.qh + 2 * i, opened.pick + 16 * i);
        memcpy(opened.negative, block.signs, sizeof(block.signs));
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        using V8 = typename Ops::V8;
        const float d = Ops::half(block.d);
        return {{V8::fma(Ops::template from_fields<4>(load_word(block.scales)), V8::broadcast(2.0f * d), V8::broadcast(d))}, {V8::zero()}};
    }
};

// IQ1: the grid has 8 (v + 1), so that value = d (2 scale + 1) / 8 * (code - 8 + shift), shift 1 or -1.
template <class Ops>
struct IQ1_S {
    using Block = BlockIQ1_S;
    using Opened = Picks<32>;
    static constexpr uint32_t kType = kIQ1_S;
    static constexpr int kBlock = 256, kGroup = 32, kMaxCode = 16;
    static constexpr bool kSigned = false, kOffset = true;

    static void open(const uint8_t* span, Opened& opened) {
        const Block& block = *(const Block*)span;
        for (int i = 0; i < 2; ++i) Ops::template join_picks<PickBits{2, 4, 3, 3}>(block.qs + 16 * i, (const uint8_t*)(block.qh + 4 * i), opened.pick + 16 * i);
    }
    static typename Ops::Codes codes(const Opened& opened, int j) { return Ops::pick(kGridIQ1.entries, opened.picks(j)); }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const Block& block = *(const Block*)span;
        float odd[kSpanSubs], shift[kSpanSubs];
        for (int j = 0; j < kSpanSubs; ++j) {
            odd[j] = (float)((block.qh[j] >> 11 & 14) | 1);
            shift[j] = (float)(-7 - (block.qh[j] >> 15 << 1));
        }
        using V8 = typename Ops::V8;
        const auto scale = V8::mul(V8::load(odd), V8::broadcast(0.125f * Ops::half(block.d)));
        return {{scale}, {V8::mul(scale, V8::load(shift))}};
    }
};

// The shifts are in the codes here, as 0 or 2: value = d (2 scale + 1) / 8 * (code - 9).
template <class Ops>
struct IQ1_M {
    using Block = BlockIQ1_M;
    struct Opened : Picks<32> {
        uint16_t shifts[16];  // a byte for each pick
    };
    static constexpr uint32_t kType = kIQ1_M;
    static constexpr int kBlock = 256, kGroup = 16, kMaxCode = 18;
    static constexpr bool kSigned = false, kOffset = true;

    static void open(const uint8_t* span, Opened& opened) {
        const Block& block = *(const Block*)span;
        for (int i = 0; i < 2; ++i) Ops::template join_picks<PickBits{1, 2, 4, 3}>(block.qs + 16 * i, block.qh + 8 * i, opened.pick + 16 * i);
        for (int i = 0; i < 16; ++i) {
            const uint16_t positive = (uint16_t)~block.qh[i];  // bits 3 and 7
            opened.shifts[i] = (uint16_t)((positive & 0x08) >> 2 | (positive & 0x80) << 2);
        }
    }
    static typename Ops::Codes codes(const Opened& opened, int j) {
        return Ops::add_to_eights(Ops::pick(kGridIQ1.entries, opened.picks(j)), (const uint8_t*)(opened.shifts + 2 * j));
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int) {
        const uint16_t* packed = ((const Block*)span)->scales;
        const uint16_t d = (uint16_t)(packed[0] >> 12 | (packed[1] >> 12 << 4) | (packed[2] >> 12 << 8) | (packed[3] >> 12 << 12));
        using V8 = typename Ops::V8;
        const float quarter = 0.25f * Ops::half(d);
        const auto unit = V8::broadcast(quarter), half_unit = V8::broadcast(0.5f * quarter), zero_point = V8::broadcast(-9.0f);
        const auto low = V8::fma(threes(packed), unit, half_unit), high = V8::fma(threes(packed + 2), unit, half_unit);
        return {{low, high}, {V8::mul(low, zero_point), V8::mul(high, zero_point)}};
    }

  private:
    static typename Ops::V8::Reg threes(const uint16_t* packed) {
        return Ops::template from_fields<3>((packed[0] & 0xfffu) | (packed[1] & 0xfffu) << 12);
    }
};

}  // namespace
}  // namespace moespan
