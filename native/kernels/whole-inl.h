// Products whose scales are whole numbers, times a float for a span of 256 columns: Q2_K.
//
// A group's integer product is multiplied by its scale as it is, those of a sub-block are added, and only then there is a float:
//   sum over spans of   d * sum over sub-blocks of  sx * sum over groups of  scale * (c . q)   -   dmin * sum over groups of  min * (sx * sum(q))
// so conversions and multiply-adds of floats are there for sub-blocks and spans, not for groups. gemv and gemm add in the same order. (Q3_K gains nothing by
// it: its scales must be put together from their bits first.)
#pragma once

#include "gemm-inl.h"
#include "tiles-inl.h"

namespace moespan {
namespace {

// T tokens' sums in the making: of the span that is read, and of those before it.
template <class Ops, int T>
struct WholeSums {
    using Reg = typename Ops::Reg;
    Reg all[T], products[T], minima[T];

    void begin() {
        for (int i = 0; i < T; ++i) all[i] = Ops::zero();
    }
    void begin_span() {
        for (int i = 0; i < T; ++i) products[i] = minima[i] = Ops::zero();
    }
    // Group g of sub-block `sub` of the tokens from t on has this minimum.
    template <int kGroups>
    void add_minimum(const Tokens& x, size_t t, size_t sub, int g, Reg minimum) {
        const size_t subs = x.cols / kSubBlock;
        for (int i = 0; i < T; ++i) minima[i] = Ops::fma(minimum, Ops::broadcast(x.half_sums[((t + i) * subs + sub) * kGroups + g]), minima[i]);
    }
    void add_products(const Tokens& x, size_t t, size_t sub, const typename Ops::Ints* dots) {
        const size_t subs = x.cols / kSubBlock;
        for (int i = 0; i < T; ++i) products[i] = Ops::fma(Ops::floats(dots[i]), Ops::broadcast(x.scales[(t + i) * subs + sub]), products[i]);
    }
    void end_span(Reg d, Reg minus_dmin) {
        for (int i = 0; i < T; ++i) all[i] = Ops::fma(minima[i], minus_dmin, Ops::fma(products[i], d, all[i]));
    }
};

// Sub-block j of a span, `sub` of all, for T tokens: a part after the other, from opened steps.
template <class Ops, class Tiles, int T>
inline void add_whole_steps(const uint8_t* lines, const typename Tiles::WholeScales& span, int j, size_t sub, const Tokens& x, size_t t,
                            WholeSums<Ops, T>* sums) {
    constexpr int kGroups = kSubBlock / Tiles::kGroup, kGroupSteps = Tiles::kGroup / 4;
#pragma GCC unroll 2
    for (int part = 0; part < kParts<Ops>; ++part) {
        typename Ops::Step steps[kSteps];
        open_steps<Ops, Tiles>(lines + part * 4 * Ops::kLanes, steps);
        typename Ops::Ints dots[T];
        for (int i = 0; i < T; ++i) dots[i] = Ops::no_ints();
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
            const auto scale = span.scale(j * kGroups + g, part);
            for (int i = 0; i < T; ++i) {
                const int8_t* codes = x.codes + (t + i) * x.cols + sub * kSubBlock + g * Tiles::kGroup;
                dots[i] = Ops::template add_scaled_steps<kGroupSteps, Tiles::kMaxCode>(steps + g * kGroupSteps, codes, scale, dots[i]);
            }
            sums[part].template add_minimum<kGroups>(x, t, sub, g, span.minimum(j * kGroups + g, part));
        }
        sums[part].add_products(x, t, sub, dots);
    }
}

// The same for one token, both parts at once from lines of 2 bits: in registers that steps would fill.
template <class Ops, class Tiles>
inline void add_whole_twos(const uint8_t* lines, const typename Tiles::WholeScales& span, int j, size_t sub, const Tokens& x, size_t t,
                           WholeSums<Ops, 1>* sums) {
    constexpr int kGroups = 2;
    const int8_t* codes = x.codes + t * x.cols + sub * kSubBlock;
    typename Ops::Ints dots[kParts<Ops>], scales[kGroups][kParts<Ops>];
    for (int part = 0; part < kParts<Ops>; ++part) {
        dots[part] = Ops::no_ints();
        for (int g = 0; g < kGroups; ++g) {
            scales[g][part] = span.scale(kGroups * j + g, part);
            sums[part].template add_minimum<kGroups>(x, t, sub, g, span.minimum(kGroups * j + g, part));
        }
    }
    Ops::template add_scaled_twos<0>(lines, codes, scales[0], dots);
    Ops::template add_scaled_twos<1>(lines, codes + 16, scales[1], dots);
    for (int part = 0; part < kParts<Ops>; ++part) sums[part].add_products(x, t, sub, dots + part);
}

template <class Ops, class Tiles>
constexpr bool kAddsTwos = Tiles::kBits == 2 &&
    requires(const uint8_t* lines, const int8_t* x, typename Ops::Ints* ints) { Ops::template add_scaled_twos<0>(lines, x, ints, ints); };

// As strip_tile (strips-inl.h).
template <class Ops, class Tiles, int T>
inline void whole_strip_tile(const uint8_t* strip, ptrdiff_t ahead, const Tokens& x, size_t t, typename Ops::Reg (*results)[T]) {
    const size_t subs = x.cols / kSubBlock;
    const uint8_t *lines = strip, *scales = strip + Strip<Tiles>::code_bytes(x.cols);
    WholeSums<Ops, T> sums[kParts<Ops>];
    for (auto& part : sums) part.begin();
    for (size_t first = 0; first < subs; first += kSpanSubs) {
        const int count = subs - first < kSpanSubs ? (int)(subs - first) : kSpanSubs;
        const typename Tiles::WholeScales span(scales);
        for (size_t byte = 0; byte < kSpanSubs * Tiles::kSubScaleBytes; byte += kLine) Ops::prefetch_far(scales + ahead + byte);
        for (auto& part : sums) part.begin_span();
        for (int j = 0; j < count; ++j, lines += Tiles::kBits * kLine) {
            for (int line = 0; line < Tiles::kBits; ++line) Ops::prefetch_far(lines + ahead + line * kLine);
            if constexpr (T == 1 && kAddsTwos<Ops, Tiles>) {
                add_whole_twos<Ops, Tiles>(lines, span, j, first + j, x, t, sums);
            } else {
                add_whole_steps<Ops, Tiles, T>(lines, span, j, first + j, x, t, sums);
            }
        }
        for (int part = 0; part < kParts<Ops>; ++part) sums[part].end_span(span.d[part], span.minus_dmin[part]);
        scales += count * Tiles::kSubScaleBytes;
    }
    for (int part = 0; part < kParts<Ops>; ++part) {
        for (int i = 0; i < T; ++i) results[part][i] = sums[part].all[i];
    }
}

// A panel of such a format has its scales as Ints, minima in the place of offsets, and behind them d and -dmin of each span.
template <class Ops, class Tiles>
inline void put_whole_scales(const uint8_t* packed, size_t part, size_t first, int count, const Panel<Ops, Tiles>& panel) {
    constexpr size_t P = Ops::kLanes, kGroups = kSubBlock / Tiles::kGroup;
    const typename Tiles::WholeScales span(packed);
    for (int g = 0; g < count * (int)kGroups; ++g) {
        const size_t to = (first * kGroups + g) * P;
        Ops::store_ints(panel.scales + to, span.scale(g, (int)part));
        Ops::store(panel.offsets + to, span.minimum(g, (int)part));
    }
    Ops::store(panel.units + first / kSpanSubs * 2 * P, span.d[part]);
    Ops::store(panel.units + first / kSpanSubs * 2 * P + P, span.minus_dmin[part]);
}

// As panel_tile (gemm-inl.h).
template <class Ops, class Format, int T>
inline void whole_panel_tile(const Panel<Ops, Format>& panel, const Tokens& x, size_t t, typename Ops::Reg* results) {
    constexpr size_t P = Ops::kLanes;
    constexpr int kGroups = kSubBlock / Format::kGroup, kGroupSteps = Format::kGroup / 4;
    const size_t subs = x.cols / kSubBlock;
    WholeSums<Ops, T> sums;
    sums.begin();
    const uint8_t* w = panel.codes;
    const float *scale = panel.scales, *offset = panel.offsets, *unit = panel.units;
    for (size_t first = 0; first < subs; first += kSpanSubs, unit += 2 * P) {
        sums.begin_span();
        for (size_t sub = first; sub < subs && sub < first + kSpanSubs; ++sub) {
            typename Ops::Ints dots[T];
            for (int i = 0; i < T; ++i) dots[i] = Ops::no_ints();
#pragma GCC unroll 2
            for (int g = 0; g < kGroups; ++g) {
                const int8_t* codes[T];
                for (int i = 0; i < T; ++i) codes[i] = x.codes + (t + i) * x.cols + sub * kSubBlock + g * Format::kGroup;
                Ops::template add_scaled_panel<T, kGroupSteps, Format::kMaxCode>(w + g * Format::kGroup * P, codes, Ops::load_ints(scale + g * P), dots);
                sums.template add_minimum<kGroups>(x, t, sub, g, Ops::load(offset + g * P));
            }
            sums.add_products(x, t, sub, dots);
            w += kSubBlock * P;
            scale += kGroups * P;
            offset += kGroups * P;
        }
        sums.end_span(Ops::load(unit), Ops::load(unit + P));
    }
    for (int i = 0; i < T; ++i) results[i] = sums.all[i];
}

}  // namespace
}  // namespace moespan
