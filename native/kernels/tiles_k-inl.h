// The K-quants in tile order: how the scales of a super-block of 16 rows lie side by side. The interface is tiles-inl.h's.
#pragma once

#include "formats_k-inl.h"
#include "tiles-inl.h"

namespace moespan {
namespace {

// Q4_K and Q5_K: the halves d and dmin of each row, then for sub-block j a line of 16 bytes scale | min >> 4 << 6, then for each two the low
// nibbles of their minima: 64 + 128 + 64 bytes a span.
template <class Ops, class Row, int bits>
struct ScaledTiles : Row {
    using RowOrder = Row;
    static constexpr int kBits = bits, kMaxScale = 63;
    static constexpr size_t kSubScaleBytes = 32, kHalves = 4 * kStripRows, kMinBits = kHalves + kSpanSubs * kStripRows;

    static void pack_scales(const uint8_t* const* spans, int from, int count, uint8_t* out) {
        memset(out, 0, kSpanSubs * kSubScaleBytes);
        for (size_t r = 0; r < kStripRows; ++r) {
            const auto& block = *(const typename Row::Block*)spans[r];
            memcpy(out + 2 * r, &block.d, 2);
            memcpy(out + 2 * kStripRows + 2 * r, &block.dmin, 2);
            for (int j = 0; j < count; ++j) {
                const uint8_t* packed = block.scales;
                const int sub = from + j;
                const int scale = sub < 4 ? packed[sub] & 63 : (packed[sub + 4] & 15) | packed[sub - 4] >> 6 << 4;
                const int min = sub < 4 ? packed[sub + 4] & 63 : packed[sub + 4] >> 4 | packed[sub] >> 6 << 4;
                out[kHalves + j * kStripRows + r] = (uint8_t)(scale | min >> 4 << 6);
                out[kMinBits + j / 2 * kStripRows + r] |= (uint8_t)((min & 15) << 4 * (j % 2));
            }
        }
    }

    struct SpanScales {
        typename Ops::Reg d[kParts<Ops>], minus_dmin[kParts<Ops>];
        uint8_t scales[kSpanSubs * kStripRows], mins[kSpanSubs * kStripRows];

        SpanScales(const uint8_t* p, int) {
            load_halves<Ops>(p, d);
            load_halves<Ops>(p + 2 * kStripRows, minus_dmin);
            for (auto& m : minus_dmin) m = Ops::sub(Ops::zero(), m);
            for (size_t i = 0; i < kSpanSubs * kStripRows; ++i) scales[i] = p[kHalves + i] & 63;
            for (int two = 0; two < kSpanSubs / 2; ++two) {
                const uint8_t *high = p + kHalves + 2 * two * kStripRows, *low = p + kMinBits + two * kStripRows;
                uint8_t* to = mins + 2 * two * kStripRows;
                for (size_t r = 0; r < kStripRows; ++r) to[r] = (uint8_t)((low[r] & 15) | (high[r] >> 2 & 0x30));
                for (size_t r = 0; r < kStripRows; ++r) to[kStripRows + r] = (uint8_t)(low[r] >> 4 | (high[kStripRows + r] >> 2 & 0x30));
            }
        }
        typename Ops::Reg scale(int j, int part) const { return Ops::mul(d[part], Ops::lanes_u8(scales + j * kStripRows + part * Ops::kLanes)); }
        typename Ops::Reg offset(int j, int part, typename Ops::Reg) const {
            return Ops::mul(minus_dmin[part], Ops::lanes_u8(mins + j * kStripRows + part * Ops::kLanes));
        }
    };
};

template <class Ops>
using Q4_KTiles = ScaledTiles<Ops, Q4_K<Ops>, 4>;
template <class Ops>
using Q5_KTiles = ScaledTiles<Ops, Q5_K<Ops>, 5>;

// The half d of each row, then the signed scales of 16 groups of 16.
template <class Ops>
struct Q6_KTiles : Q6_K<Ops> {
    using RowOrder = Q6_K<Ops>;
    using Block = typename Q6_K<Ops>::Block;
    static constexpr int kBits = 6, kMaxScale = 128;
    static constexpr size_t kSubScaleBytes = (2 + 16) * kStripRows / kSpanSubs;

    static void pack_scales(const uint8_t* const* spans, int from, int count, uint8_t* out) {
        memset(out, 0, kSpanSubs * kSubScaleBytes);
        for (size_t r = 0; r < kStripRows; ++r) {
            const Block& block = *(const Block*)spans[r];
            memcpy(out + 2 * r, &block.d, 2);
            for (int g = 0; g < 2 * count; ++g) out[(2 + g) * kStripRows + r] = (uint8_t)block.scales[2 * from + g];
        }
    }

    struct SpanScales {
        typename Ops::Reg d[kParts<Ops>];
        const int8_t* scales;
        SpanScales(const uint8_t* p, int) : scales((const int8_t*)p + 2 * kStripRows) { load_halves<Ops>(p, d); }
        typename Ops::Reg scale(int g, int part) const { return Ops::mul(d[part], Ops::lanes_i8(scales + g * kStripRows + part * Ops::kLanes)); }
        typename Ops::Reg offset(int, int, typename Ops::Reg scale) const { return Ops::mul(scale, Ops::broadcast(-32.0f)); }
    };
};

// The halves d and dmin of each row, then for each of 16 groups of 16 a line of 16 bytes, scale | min << 4, as in the block.
template <class Ops>
struct Q2_KTiles : Q2_K<Ops> {
    using RowOrder = Q2_K<Ops>;
    using Block = typename RowOrder::Block;
    static constexpr int kBits = 2, kMaxScale = 15;
    static constexpr size_t kSubScaleBytes = (4 + 16) * kStripRows / kSpanSubs;

    static void pack_scales(const uint8_t* const* spans, int from, int count, uint8_t* out) {
        memset(out, 0, kSpanSubs * kSubScaleBytes);
        for (size_t r = 0; r < kStripRows; ++r) {
            const Block& block = *(const Block*)spans[r];
            memcpy(out + 2 * r, &block.d, 2);
            memcpy(out + 2 * kStripRows + 2 * r, &block.dmin, 2);
            for (int g = 0; g < 2 * count; ++g) out[(4 + g) * kStripRows + r] = block.scales[2 * from + g];
        }
    }

    struct SpanScales {
        typename Ops::Reg d[kParts<Ops>], minus_dmin[kParts<Ops>];
        uint8_t scales[16 * kStripRows], mins[16 * kStripRows];

        SpanScales(const uint8_t* p, int) {
            load_halves<Ops>(p, d);
            load_halves<Ops>(p + 2 * kStripRows, minus_dmin);
            for (auto& m : minus_dmin) m = Ops::sub(Ops::zero(), m);
            for (size_t i = 0; i < sizeof(scales); ++i) scales[i] = p[4 * kStripRows + i] & 15;
            for (size_t i = 0; i < sizeof(mins); ++i) mins[i] = p[4 * kStripRows + i] >> 4;
        }
        typename Ops::Reg scale(int g, int part) const { return Ops::mul(d[part], Ops::lanes_u8(scales + g * kStripRows + part * Ops::kLanes)); }
        typename Ops::Reg offset(int g, int part, typename Ops::Reg) const {
            return Ops::mul(minus_dmin[part], Ops::lanes_u8(mins + g * kStripRows + part * Ops::kLanes));
        }
    };

    struct WholeScales {
        typename Ops::Reg d[kParts<Ops>], minus_dmin[kParts<Ops>];
        const uint8_t* packed;

        explicit WholeScales(const uint8_t* p) : packed(p + 4 * kStripRows) {
            load_halves<Ops>(p, d);
            load_halves<Ops>(p + 2 * kStripRows, minus_dmin);
            for (auto& m : minus_dmin) m = Ops::sub(Ops::zero(), m);
        }
        typename Ops::Ints scale(int g, int part) const { return Ops::low_nibbles(packed + g * kStripRows + part * Ops::kLanes); }
        typename Ops::Reg minimum(int g, int part) const { return Ops::high_nibbles(packed + g * kStripRows + part * Ops::kLanes); }
    };
};

// The half d of each row, then for each of the block's 12 bytes of scales a line of 16.
template <class Ops>
struct Q3_KTiles : Q3_K<Ops> {
    using RowOrder = Q3_K<Ops>;
    using Block = typename RowOrder::Block;
    static constexpr int kBits = 3, kMaxScale = 32;
    static constexpr size_t kSubScaleBytes = (2 + 12) * kStripRows / kSpanSubs;

    static void pack_scales(const uint8_t* const* spans, int from, int count, uint8_t* out) {
        memset(out, 0, kSpanSubs * kSubScaleBytes);
        for (size_t r = 0; r < kStripRows; ++r) {
            const Block& block = *(const Block*)spans[r];
            memcpy(out + 2 * r, &block.d, 2);
            for (int g = 0; g < 2 * count; ++g) {
                const int of = 2 * from + g, low = block.scales[of % 8] >> 4 * (of / 8) & 15, high = block.scales[8 + of % 4] >> 2 * (of / 4) & 3;
                out[(2 + g % 8) * kStripRows + r] |= (uint8_t)(low << 4 * (g / 8));
                out[(2 + 8 + g % 4) * kStripRows + r] |= (uint8_t)(high << 2 * (g / 4));
            }
        }
    }

    struct SpanScales {
        typename Ops::Reg d[kParts<Ops>];
        int8_t scales[16 * kStripRows];

        SpanScales(const uint8_t* p, int) {
            load_halves<Ops>(p, d);
            const uint8_t* high = p + (2 + 8) * kStripRows;
#pragma GCC unroll 4
            for (int four = 0; four < 4; ++four) {  // groups 4 * four .. + 3, whose lines follow each other
                const uint8_t* low = p + (2 + 4 * (four % 2)) * kStripRows;
                for (size_t i = 0; i < 4 * kStripRows; ++i) {
                    const uint8_t code = (uint8_t)((low[i] >> 4 * (four / 2) & 15) | (high[i] >> 2 * four & 3) << 4);
                    scales[four * 4 * kStripRows + i] = (int8_t)(code - 32);
                }
            }
        }
        typename Ops::Reg scale(int g, int part) const { return Ops::mul(d[part], Ops::lanes_i8(scales + g * kStripRows + part * Ops::kLanes)); }
        typename Ops::Reg offset(int, int, typename Ops::Reg scale) const { return Ops::mul(scale, Ops::broadcast(-4.0f)); }
    };
};

}  // namespace
}  // namespace moespan
