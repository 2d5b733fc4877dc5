// Products from tile order (tiles-inl.h): gemv for few tokens, straight from the strips as they come from RAM; gemm for many, through panels
// that are unpacked once into cache-sized scratch, as in row order.
//
// For a strip and a token, with s, o and c the rows' scales, offsets and codes, sx and q the activations':
//   sum over groups of  (s * sx) * (c . q)  +  o * (sx * sum(q))
// in a lane for each row.
#pragma once

#include "gemm-inl.h"
#include "isa/kernels.h"
#include "tiles-inl.h"
#include "whole-inl.h"

namespace moespan {
namespace {

// Bytes, at least, between the strip that is read and the one that is fetched, into L2: as much as comes from RAM while a core waits for the first of it.
constexpr size_t kStripsAhead = 32 * 1024;

// Whether a token's products with a sub-block can be had from its lines at once, without steps between: plain codes of 4 bits, one scale for all of them.
template <class Ops, class Tiles>
constexpr bool kDotsNibbles = Tiles::kBits == 4 && Tiles::kGroup == kSubBlock && !Tiles::kSigned && !requires { Tiles::values(); } &&
    requires(const uint8_t* lines, const int8_t* x, typename Ops::Reg* out) { Ops::dot_nibbles(lines, x, out); };

// T tokens from t on times one strip; sums[part][i]. Another strip of the matrix, `ahead` behind it in memory, is fetched meanwhile.
template <class Ops, class Tiles, int T>
inline void strip_tile(const uint8_t* strip, ptrdiff_t ahead, const Tokens& x, size_t t, typename Ops::Reg (*sums)[T]) {
    using Reg = typename Ops::Reg;
    constexpr int kGroups = kSubBlock / Tiles::kGroup, kGroupSteps = Tiles::kGroup / 4;
    constexpr size_t kPartBytes = 4 * Ops::kLanes;
    const size_t subs = x.cols / kSubBlock;
    const uint8_t *lines = strip, *scales = strip + Strip<Tiles>::code_bytes(x.cols);
    const float* group_sums = Tiles::kGroup == kSubBlock ? x.sums : x.half_sums;
    const int8_t* codes[T];
    for (int i = 0; i < T; ++i) codes[i] = x.codes + (t + i) * x.cols;
    for (int part = 0; part < kParts<Ops>; ++part) {
        for (int i = 0; i < T; ++i) sums[part][i] = Ops::zero();
    }
    for (size_t first = 0; first < subs; first += kSpanSubs) {
        const int count = subs - first < kSpanSubs ? (int)(subs - first) : kSpanSubs;
        const typename Tiles::SpanScales span(scales, count);
        for (size_t byte = 0; byte < kSpanSubs * Tiles::kSubScaleBytes; byte += kLine) Ops::prefetch_far(scales + ahead + byte);
        for (int j = 0; j < count; ++j) {
            const size_t at = first + j;
            for (int line = 0; line < Tiles::kBits; ++line) Ops::prefetch_far(lines + ahead + line * kLine);
            [[maybe_unused]] Reg nibbles[kParts<Ops>];
            if constexpr (T == 1 && kDotsNibbles<Ops, Tiles>) Ops::dot_nibbles(lines, codes[0] + at * kSubBlock, nibbles);
#pragma GCC unroll 2
            for (int part = 0; part < kParts<Ops>; ++part) {
                [[maybe_unused]] typename Ops::Step steps[kSteps];
                if constexpr (T > 1 || !kDotsNibbles<Ops, Tiles>) open_steps<Ops, Tiles>(lines + part * kPartBytes, steps);
#pragma GCC unroll 2
                for (int g = 0; g < kGroups; ++g) {
                    const Reg scale = span.scale(j * kGroups + g, part), offset = span.offset(j * kGroups + g, part, scale);
#pragma GCC unroll 8
                    for (int i = 0; i < T; ++i) {
                        Reg dots;
                        if constexpr (T == 1 && kDotsNibbles<Ops, Tiles>) {
                            dots = nibbles[part];
                        } else {
                            const int8_t* group = codes[i] + at * kSubBlock + g * Tiles::kGroup;
                            dots = Ops::template dot_steps<kGroupSteps, Tiles::kSigned, Tiles::kMaxCode>(steps + g * kGroupSteps, group);
                        }
                        const size_t token = (t + i) * subs + at;
                        sums[part][i] = Ops::fma(dots, Ops::mul(scale, Ops::broadcast(x.scales[token])), sums[part][i]);
                        if constexpr (Tiles::kOffset) sums[part][i] = Ops::fma(offset, Ops::broadcast(group_sums[token * kGroups + g]), sums[part][i]);
                    }
                }
            }
            lines += Tiles::kBits * kLine;
        }
        scales += count * Tiles::kSubScaleBytes;
    }
}

// Rows::data is a strip, and row_bytes a strip's.
template <class Ops, class Tiles>
void gemv_strips(const Rows& rows, const Tokens& x, const Outputs& out) {
    const size_t strips = (rows.count + kStripRows - 1) / kStripRows, far = (kStripsAhead + rows.row_bytes - 1) / rows.row_bytes;
    const size_t apart = far < strips ? far : strips;
    for (size_t row = 0; row < rows.count; row += kStripRows) {
        const size_t i = row / kStripRows, fetched = i + apart;
        const uint8_t* strip = rows.data + i * rows.row_bytes;
        ptrdiff_t ahead = 0;  // the strip itself: nothing is fetched
        if (fetched < strips) {
            ahead = (ptrdiff_t)(apart * rows.row_bytes);
        } else if (rows.next != nullptr) {
            ahead = (ptrdiff_t)((uintptr_t)rows.next + (fetched - strips) * rows.row_bytes - (uintptr_t)strip);
        }
        in_tiles<Ops::kStripTokens>(0, x.n, [&]<int T>(size_t t) {
            typename Ops::Reg sums[kParts<Ops>][T];
            if constexpr (kWhole<Tiles>) {
                whole_strip_tile<Ops, Tiles, T>(strip, ahead, x, t, sums);
            } else {
                strip_tile<Ops, Tiles, T>(strip, ahead, x, t, sums);
            }
            for (int part = 0; part < kParts<Ops>; ++part) {
                const size_t at = row + part * Ops::kLanes;
                if (at < rows.count) put_panel<Ops, T>(out, t, at, rows.count - at < Ops::kLanes ? rows.count - at : Ops::kLanes, sums[part]);
            }
        });
    }
}

// The scales of one part of a span, at `packed` in its strip, to a panel.
template <class Ops, class Tiles>
inline void put_panel_scales(const uint8_t* packed, size_t part, size_t first, int count, const Panel<Ops, Tiles>& panel) {
    constexpr size_t P = Ops::kLanes, kGroups = kSubBlock / Tiles::kGroup;
    const typename Tiles::SpanScales span(packed, count);
    for (int g = 0; g < count * (int)kGroups; ++g) {
        const size_t to = (first * kGroups + g) * P;
        const auto scale = span.scale(g, (int)part);
        Ops::store(panel.scales + to, scale);
        if constexpr (Tiles::kOffset) Ops::store(panel.offsets + to, span.offset(g, (int)part, scale));
    }
}

// One part of a strip into a panel.
template <class Ops, class Tiles>
void unpack_strip(const uint8_t* strip, size_t part, size_t cols, const Panel<Ops, Tiles>& panel) {
    constexpr size_t P = Ops::kLanes;
    const size_t subs = cols / kSubBlock;
    const uint8_t *lines = strip + part * 4 * P, *scales = strip + Strip<Tiles>::code_bytes(cols);
    for (size_t first = 0; first < subs; first += kSpanSubs) {
        const int count = subs - first < kSpanSubs ? (int)(subs - first) : kSpanSubs;
        if constexpr (kWhole<Tiles>) {
            put_whole_scales(scales, part, first, count, panel);
        } else {
            put_panel_scales(scales, part, first, count, panel);
        }
        for (int j = 0; j < count; ++j, lines += Tiles::kBits * kLine) {
            typename Ops::Step steps[kSteps];
            open_steps<Ops, Tiles>(lines, steps);
            for (int s = 0; s < kSteps; ++s) Ops::store_step(panel.codes + ((first + j) * kSteps + s) * 4 * P, steps[s]);
        }
        scales += count * Tiles::kSubScaleBytes;
    }
}

template <class Ops, class Tiles>
void gemm_strips(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* scratch) {
    constexpr size_t P = Ops::kLanes;
    const size_t bytes = Panel<Ops, Tiles>::bytes(x.cols);
    gemm_chunk<Ops, Ops::kTokens>(
        rows, x, x.cols,
        [&](size_t p, size_t row, size_t) {
            const uint8_t* strip = rows.data + row / kStripRows * rows.row_bytes;
            unpack_strip(strip, row % kStripRows / P, x.cols, Panel<Ops, Tiles>(scratch + p * bytes, x.cols));
        },
        [&]<int T>(size_t p, size_t row, size_t count, size_t t) {
            typename Ops::Reg sums[T];
            const Panel<Ops, Tiles> panel(scratch + p * bytes, x.cols);
            if constexpr (kWhole<Tiles>) {
                whole_panel_tile<Ops, Tiles, T>(panel, x, t, sums);
            } else {
                panel_tile<Ops, Tiles, T>(panel, x, t, sums);
            }
            put_panel<Ops, T>(out, t, row, count, sums);
        });
}

template <class Tiles>
size_t strip_bytes(size_t cols) {
    return Strip<Tiles>::bytes(cols);
}

}  // namespace
}  // namespace moespan
