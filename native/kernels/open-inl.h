// Strips opened to bf16: what amx-inl.h multiplies.
//
// It is arithmetic on half-precision floats, 32 at once: scale * code + offset. A half has 5 bits of exponent and 10 of mantissa, bf16 has 8 and 7:
// rounded at bit 3 and shifted there, a half is read as bf16 of 2^-112 times its value. So that halves neither overflow nor lose digits, weights are
// scaled by a power of two for each row, and activations by 2^64 (kInputPower) to keep products away from the ends of float32's
// exponents; both are taken out of the sums. An error of a weight is bf16's: at most 2^-9 of it.
#pragma once

#include "strips-inl.h"

namespace moespan {
namespace {

// A tile register: 16 rows of 64 bytes, which are 32 numbers of bf16.
constexpr size_t kTile = 16, kTileColumns = 32, kTileHalves = kTile * kTileColumns;
constexpr int kInputPower = 64, kBiasPower = 112;

// Codes of 4 bits are masked out of their line where they stand, or a nibble further: 16 * code, read as a subnormal half, is 2^-20 * code, and nothing
// has to be converted.
template <class Tiles>
constexpr bool kNibbles = Tiles::kBits == 4 && !requires { Tiles::values(); };
constexpr int kNibblePower = 20;

// The largest weight of a row is brought below 2^15, a half's largest power; where codes are 2^-20, below 2^-1, so that scales times 2^20 are halves.
template <class Tiles>
constexpr int kLargestPower = kNibbles<Tiles> ? -1 : 15;

// What the weights of a strip's rows are multiplied by as halves, and what their sums are multiplied by.
struct RowPowers {
    float weight[kTile], sum[kTile];
};

// largest = the larger of itself and a bound of the weights of a span.
template <class Ops, class Tiles>
inline void bound_span(const typename Tiles::SpanScales& span, int count, typename Ops::Reg* largest, typename Ops::Reg* poison) {
    const auto most = Ops::broadcast((float)Tiles::kMaxCode);
    const auto join = [&](typename Ops::Reg bound, int part) {
        largest[part] = Ops::max(largest[part], bound);
        poison[part] = Ops::fma(bound, Ops::zero(), poison[part]);
    };
    for (int part = 0; part < kParts<Ops>; ++part) {
        if constexpr (requires { Tiles::kMaxScale; }) {
            const auto most_scaled = Ops::broadcast((float)(Tiles::kMaxCode * Tiles::kMaxScale));
            auto bound = Ops::mul(Ops::magnitude(span.d[part]), most_scaled);
            if constexpr (requires { span.minus_dmin; }) {
                bound = Ops::fma(Ops::magnitude(span.minus_dmin[part]), Ops::broadcast((float)Tiles::kMaxScale), bound);
            }
            join(bound, part);
        } else {
            for (int g = 0; g < count * kSubBlock / Tiles::kGroup; ++g) {
                const auto scale = span.scale(g, part);
                auto bound = Ops::mul(Ops::magnitude(scale), most);
                if constexpr (Tiles::kOffset) bound = Ops::add(bound, Ops::magnitude(span.offset(g, part, scale)));
                join(bound, part);
            }
        }
    }
}

template <class Ops, class Tiles>
void find_powers(const uint8_t* scales, size_t subs, RowPowers& powers) {
    typename Ops::Reg largest[kParts<Ops>], poison[kParts<Ops>];  // poison: NaN where a scale is none or infinite, since opened weights cannot say so
    for (int part = 0; part < kParts<Ops>; ++part) {
        largest[part] = Ops::broadcast(1e-30f);  // a row of zeros has some power too
        poison[part] = Ops::zero();
    }
    for (size_t first = 0; first < subs; first += kSpanSubs, scales += kSpanSubs * Tiles::kSubScaleBytes) {
        const int count = subs - first < kSpanSubs ? (int)(subs - first) : kSpanSubs;
        bound_span<Ops, Tiles>(typename Tiles::SpanScales(scales, count), count, largest, poison);
    }
    for (int part = 0; part < kParts<Ops>; ++part) {
        const auto one = Ops::broadcast(1.0f), power = Ops::sub(Ops::broadcast((float)kLargestPower<Tiles> - 1), Ops::exponent(largest[part]));
        Ops::store(powers.weight + part * Ops::kLanes, Ops::scale_by_power(one, power));
        const auto back = Ops::scale_by_power(one, Ops::sub(Ops::broadcast((float)(kBiasPower - kInputPower)), power));
        Ops::store(powers.sum + part * Ops::kLanes, Ops::add(back, poison[part]));
    }
}

// Scales and offsets of one part of a span's rows as halves, each for both columns of a pair.
template <class Ops, class Tiles>
struct HalfScales {
    using Halves = typename Ops::Halves;
    static constexpr bool kIntegers = requires { Tiles::kMaxScale; };  // a float for the span, times an integer for each group
    static constexpr bool kMinima = requires(typename Tiles::SpanScales s) { s.minus_dmin; };

    const typename Tiles::SpanScales& span;
    const int part;
    typename Ops::Reg weight, scale_weight;
    Halves d, minus_dmin;

    HalfScales(const typename Tiles::SpanScales& s, int which, const RowPowers& powers) : span(s), part(which) {
        weight = Ops::load(powers.weight + part * Ops::kLanes);
        scale_weight = kNibbles<Tiles> ? Ops::mul(weight, Ops::broadcast((float)(1 << kNibblePower))) : weight;
        if constexpr (kIntegers) d = Ops::halves_twice(Ops::mul(span.d[part], scale_weight));
        if constexpr (kIntegers && kMinima) minus_dmin = Ops::halves_twice(Ops::mul(span.minus_dmin[part], weight));
    }
    Halves scale(int g) const {
        if constexpr (kIntegers) return Ops::mul_halves(d, Ops::bytes_twice(span.scales + g * kStripRows + part * Ops::kLanes));
        return Ops::halves_twice(Ops::mul(span.scale(g, part), scale_weight));
    }
    Halves offset(int g) const {
        if constexpr (kIntegers && kMinima) return Ops::mul_halves(minus_dmin, Ops::bytes_twice(span.mins + g * kStripRows + part * Ops::kLanes));
        if constexpr (!Tiles::kOffset) return Ops::halves_twice(Ops::zero());
        return Ops::halves_twice(Ops::mul(span.offset(g, part, span.scale(g, part)), weight));
    }
};

// One part of a sub-block's lines to a tile of B.
template <class Ops, class Tiles>
inline void open_tile(const uint8_t* lines, const HalfScales<Ops, Tiles>& scales, int j, uint16_t* tile) {
    using Halves = typename Ops::Halves;
    constexpr int kGroups = kSubBlock / Tiles::kGroup;
    Halves scale[kGroups], offset[kGroups];
    for (int g = 0; g < kGroups; ++g) {
        scale[g] = scales.scale(j * kGroups + g);
        offset[g] = scales.offset(j * kGroups + g);
    }
    const auto put_step = [&](int s, Halves even, Halves odd) {
        const int g = s * kGroups / kSteps;
        Ops::store_bf16(tile + 4 * kTile * s, Ops::fma_halves(even, scale[g], offset[g]));
        Ops::store_bf16(tile + 4 * kTile * s + 2 * kTile, Ops::fma_halves(odd, scale[g], offset[g]));
    };
    if constexpr (kNibbles<Tiles>) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
            const typename Ops::Step line = Ops::load_step(lines + l * kLine);
            put_step(l, Ops::template nibbles_at<0>(line), Ops::template nibbles_at<2>(line));
            put_step(l + 4, Ops::template nibbles_at<1>(line), Ops::template nibbles_at<3>(line));
        }
    } else {
        typename Ops::Step steps[kSteps];
        open_steps<Ops, Tiles>(lines, steps);
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; ++s) put_step(s, Ops::template even_codes<Tiles::kSigned>(steps[s]), Ops::template odd_codes<Tiles::kSigned>(steps[s]));
    }
}

// `subs` sub-blocks of a strip to as many tiles of B, `apart` halves from each other. What lies `ahead` of them is fetched into L2 meanwhile.
template <class Ops, class Tiles>
void open_strip(const uint8_t* lines, const uint8_t* packed, int subs, const RowPowers& powers, ptrdiff_t ahead, uint16_t* tiles, size_t apart) {
    for (int first = 0; first < subs; first += kSpanSubs, packed += kSpanSubs * Tiles::kSubScaleBytes) {
        const int count = subs - first < kSpanSubs ? subs - first : kSpanSubs;
        const typename Tiles::SpanScales span(packed, count);
        for (int byte = 0; byte < count * (int)Tiles::kSubScaleBytes; byte += kLine) Ops::prefetch_far(packed + ahead + byte);
        for (int part = 0; part < kParts<Ops>; ++part) {
            const HalfScales<Ops, Tiles> scales(span, part, powers);
            for (int j = 0; j < count; ++j) {
                const uint8_t* from = lines + j * Tiles::kBits * kLine;
                for (int line = 0; line < Tiles::kBits; ++line) Ops::prefetch_far(from + ahead + line * kLine);
                open_tile<Ops, Tiles>(from + part * 4 * Ops::kLanes, scales, j, tiles + j * apart + 2 * part * Ops::kLanes);
            }
        }
        lines += count * Tiles::kBits * kLine;
        tiles += count * apart;
    }
}

}  // namespace
}  // namespace moespan
