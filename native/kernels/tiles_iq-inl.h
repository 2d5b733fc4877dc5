// The types with a table of 16 values in tile order: their codes stay nibbles, looked up when a sub-block is opened. The interface is tiles-inl.h's.
#pragma once

#include "formats_iq-inl.h"
#include "tiles-inl.h"

namespace moespan {
namespace {

template <class Ops>
struct IQ4_NLTiles : SimpleTiles<Ops, IQ4_NL<Ops>, 4, 0, false> {
    using Block = BlockIQ4_NL;
    static const int8_t* values() { return kValuesIQ4.entries; }
    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::nibbles(((const Block*)span)[j].qs); }
};

// The exponent of each row, for each block of 32.
template <class Ops>
struct MXFP4Tiles : MXFP4<Ops> {
    using RowOrder = MXFP4<Ops>;
    using Block = BlockMXFP4;
    static constexpr int kBits = 4;
    static constexpr size_t kSubScaleBytes = kStripRows;
    static const int8_t* values() { return kValuesMXFP4.entries; }
    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::nibbles(((const Block*)span)[j].qs); }

    static void pack_scales(const uint8_t* const* spans, int, int count, uint8_t* out) {
        for (int j = 0; j < count; ++j) {
            for (size_t r = 0; r < kStripRows; ++r) out[j * kStripRows + r] = ((const Block*)spans[r])[j].e;
        }
    }

    struct SpanScales {
        const uint8_t* exponents;
        SpanScales(const uint8_t* p, int) : exponents(p) {}
        typename Ops::Reg scale(int j, int part) const {
            const auto exponent = Ops::sub(Ops::lanes_u8(exponents + j * kStripRows + part * Ops::kLanes), Ops::broadcast(128.0f));
            return Ops::scale_by_power(Ops::broadcast(1.0f), exponent);
        }
        typename Ops::Reg offset(int, int, typename Ops::Reg) const { return Ops::zero(); }
    };
};

// The half d of each row, its scales_h, then for each byte of scales_l a line of 16.
template <class Ops>
struct IQ4_XSTiles : IQ4_XS<Ops> {
    using RowOrder = IQ4_XS<Ops>;
    using Block = BlockIQ4_XS;
    static constexpr int kBits = 4, kMaxScale = 32;
    static constexpr size_t kSubScaleBytes = 8 * kStripRows / kSpanSubs, kHigh = 2 * kStripRows, kLow = 4 * kStripRows;
    static const int8_t* values() { return kValuesIQ4.entries; }
    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::nibbles(((const Block*)span)->qs + 16 * j); }

    static void pack_scales(const uint8_t* const* spans, int from, int count, uint8_t* out) {
        memset(out, 0, kSpanSubs * kSubScaleBytes);
        for (size_t r = 0; r < kStripRows; ++r) {
            const Block& block = *(const Block*)spans[r];
            const uint16_t high = (uint16_t)(block.scales_h >> 2 * from);
            memcpy(out + 2 * r, &block.d, 2);
            memcpy(out + kHigh + 2 * r, &high, 2);
            for (int j = 0; j < count; ++j) {
                const int sub = from + j;
                out[kLow + j / 2 * kStripRows + r] |= (uint8_t)((block.scales_l[sub / 2] >> 4 * (sub % 2) & 15) << 4 * (j % 2));
            }
        }
    }

    struct SpanScales {
        typename Ops::Reg d[kParts<Ops>];
        int8_t scales[kSpanSubs * kStripRows];

        SpanScales(const uint8_t* p, int) {
            load_halves<Ops>(p, d);
            uint8_t high[2][kStripRows];  // of sub-blocks 0 .. 3 and 4 .. 7: bytes, so that a line is one vector for the compiler
            for (size_t r = 0; r < kStripRows; ++r) {
                high[0][r] = p[kHigh + 2 * r];
                high[1][r] = p[kHigh + 2 * r + 1];
            }
#pragma GCC unroll 8
            for (int j = 0; j < kSpanSubs; ++j) {
                const uint8_t *low = p + kLow + j / 2 * kStripRows, *two = high[j / 4];
                for (size_t r = 0; r < kStripRows; ++r) {
                    const uint8_t code = (uint8_t)((low[r] >> 4 * (j % 2) & 15) | (two[r] >> 2 * (j % 4) & 3) << 4);
                    scales[j * kStripRows + r] = (int8_t)(code - 32);
                }
            }
        }
        typename Ops::Reg scale(int j, int part) const { return Ops::mul(d[part], Ops::lanes_i8(scales + j * kStripRows + part * Ops::kLanes)); }
        typename Ops::Reg offset(int, int, typename Ops::Reg) const { return Ops::zero(); }
    };
};

}  // namespace
}  // namespace moespan
