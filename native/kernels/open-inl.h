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

// Opens the sub-blocks of a strip one by one, so that products of tiles can run meanwhile.
template <class Ops, class Tiles>
class StripOpener {
    using Halves = typename Ops::Halves;
    static constexpr int kGroups = kSubBlock / Tiles::kGroup;

  public:
    // `open` reads the span of `count` sub-blocks whose scales are at `packed`.
    void take_span(const uint8_t* packed, int count, const RowPowers& powers) {
        const typename Tiles::SpanScales span(packed, count);
        for (int part = 0; part < kParts<Ops>; ++part) {
            const HalfScales<Ops, Tiles> scales(span, part, powers);
            for (int g = 0; g < count * kGroups; ++g) {
                scale_[part][g] = scales.scale(g);
                offset_[part][g] = scales.offset(g);
            }
        }
    }

    // Sub-block j of the span, whose codes are at `lines`, to a tile of B.
    void open(const uint8_t* lines, int j, uint16_t* tile) const {
        for (int part = 0; part < kParts<Ops>; ++part) {
            open_part(lines + part * 4 * Ops::kLanes, scale_[part] + j * kGroups, offset_[part] + j * kGroups, tile + 2 * part * Ops::kLanes);
        }
    }

  private:
    static void open_part(const uint8_t* lines, const Halves* scales, const Halves* offsets, uint16_t* tile) {
        Halves scale[kGroups], offset[kGroups];  // in registers, whatever the stores below may overwrite
        for (int g = 0; g < kGroups; ++g) {
            scale[g] = scales[g];
            offset[g] = offsets[g];
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

    // Of the span's groups; in memory, since the registers are the products' and the next opener's meanwhile.
    Halves scale_[kParts<Ops>][kSpanSubs * kGroups], offset_[kParts<Ops>][kSpanSubs * kGroups];
};

// The strips of a call, at(i) the i-th, and the columns that each has.
template <class Tiles, class At>
struct TileStrips {
    const At& at;
    size_t count, cols;

    size_t subs() const { return cols / kSubBlock; }
    const uint8_t* codes(size_t i, size_t sub) const { return at(i) + sub * Tiles::kBits * kLine; }
    const uint8_t* scales(size_t i, size_t sub) const { return at(i) + Strip<Tiles>::code_bytes(cols) + sub * Tiles::kSubScaleBytes; }
};

// In which order strips are opened, span by span: W side by side (or the last one alone), `depth` sub-blocks of them, then of the next W, then the next
// sub-blocks of all. depth is a multiple of a span's, or all there is.
template <int W>
class Walk {
  public:
    Walk(size_t strips, size_t subs, size_t depth) : strips_(strips), subs_(strips > 0 ? subs : 0), depth_(depth) {}

    bool ended() const { return first_ >= subs_; }
    size_t strip() const { return i_; }
    size_t width() const { return strips_ - i_ < W ? strips_ - i_ : W; }
    size_t sub() const { return first_ + k_; }
    size_t count() const { return subs_ - sub() < kSpanSubs ? subs_ - sub() : kSpanSubs; }
    void step() {
        if ((k_ += kSpanSubs) < depth_ && first_ + k_ < subs_) return;
        k_ = 0;
        if ((i_ += W) < strips_) return;
        i_ = 0;
        first_ += depth_;
    }

  private:
    size_t strips_, subs_, depth_, i_ = 0, first_ = 0, k_ = 0;
};

// Opens strips in the order of a Walk. The span after that which is opened is fetched into L2 meanwhile.
template <class Ops, class Tiles, int W, class Strips>
class Opener {
  public:
    Opener(const Strips& strips, const RowPowers* powers, size_t depth) : strips_(strips), powers_(powers), next_(strips.count, strips.subs(), depth) {}

    // The next sub-block of W strips to tiles side by side; none where all are opened. Out of line, since it stands between products in many places.
    __attribute__((noinline)) void open(uint16_t* tiles) {
        if (j_ == count_ && !take_span()) return;
        for (size_t b = 0; b < width_; ++b) {
            for (int line = 0; line < Tiles::kBits; ++line) Ops::prefetch_far(lines_[b] + ahead_[b] + line * kLine);
            openers_[b].open(lines_[b], (int)j_, tiles + b * kTileHalves);
            lines_[b] += Tiles::kBits * kLine;
        }
        ++j_;
    }

  private:
    bool take_span() {
        if (next_.ended()) return false;
        const Walk<W> at = next_;
        next_.step();
        width_ = at.width();
        count_ = at.count();
        j_ = 0;
        for (size_t b = 0; b < width_; ++b) {
            const size_t i = at.strip() + b, fetched = next_.strip() + b;
            const uint8_t* scales = strips_.scales(i, at.sub());
            lines_[b] = strips_.codes(i, at.sub());
            const bool more = !next_.ended() && b < next_.width();
            ahead_[b] = more ? (ptrdiff_t)((uintptr_t)strips_.codes(fetched, next_.sub()) - (uintptr_t)lines_[b]) : 0;
            const uint8_t* far = more ? strips_.scales(fetched, next_.sub()) : scales;
            for (size_t byte = 0; byte < kSpanSubs * Tiles::kSubScaleBytes; byte += kLine) Ops::prefetch_far(far + byte);
            openers_[b].take_span(scales, (int)count_, powers_[i]);
        }
        return true;
    }

    const Strips& strips_;
    const RowPowers* const powers_;
    Walk<W> next_;
    size_t width_ = 0, count_ = 0, j_ = 0;
    const uint8_t* lines_[W];
    ptrdiff_t ahead_[W];
    StripOpener<Ops, Tiles> openers_[W];
};

}  // namespace
}  // namespace moespan
