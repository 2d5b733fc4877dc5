// Few tokens (decode): products straight from the GGUF blocks, which come from RAM once.
//
// For one row and one token, with s the weights' scale, o their offset, c their codes; sx and q the activations' scale and codes:
//   sum over groups of  s * sx * (c . q)  +  o * (sx * sum(q))
// The first part is an integer dot product for each sub-block; the second a float dot product of 8 groups at once (Tokens::sums).
#pragma once

#include "formats-inl.h"
#include "isa/kernels.h"

namespace moespan {
namespace {

constexpr size_t kAhead = 4096;  // bytes, at least, between the weights that are read and those that are fetched

// p[0 .. count - 1], then zeros: p may end after count values.
template <class V8>
inline typename V8::Reg load_first(const float* p, int count) {
    return count == V8::kLanes ? V8::load(p) : V8::load_partial(p, count);
}

// p[0 .. 7], with zeros in the first `done` lanes.
template <class V8>
inline typename V8::Reg load_from(const float* p, int done) {
    static constexpr float kFrom[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    return done == 0 ? V8::load(p) : V8::mul(V8::load(p), V8::load(kFrom + 8 - done));
}

// Sub-blocks sub .. sub + count - 1 of a row, of which the first `done` were in the span before this one.
struct SpanPart {
    size_t sub;
    int count, done;
};

// The span at sub-block `sub` of a stretch first .. last - 1. At the end of a stretch it begins earlier, if it can, so as to be whole.
inline SpanPart span_part(size_t first, size_t sub, size_t last) {
    if (last - sub >= kSpanSubs) return {sub, kSpanSubs, 0};
    if (last - first >= kSpanSubs) return {last - kSpanSubs, kSpanSubs, (int)(sub + kSpanSubs - last)};
    return {sub, (int)(last - sub), 0};
}

// The scales of a span's groups, times the activations' own, to scales[0 ..]; its offset part, added to `offsets` in 8 lanes.
// `span` and `scales` stand at part.sub, `at` is the index of that sub-block in x's arrays.
template <class Ops, class Format>
inline typename Ops::V8::Reg span_scales(const uint8_t* span, const SpanPart& part, const Tokens& x, size_t at, float* scales, typename Ops::V8::Reg offsets) {
    using V8 = typename Ops::V8;
    const auto s = Format::scales(span, part.count);
    const auto input = load_first<V8>(x.scales + at, part.count);
    if constexpr (Format::kGroup == kSubBlock) {
        V8::store(scales, V8::mul(s.scale[0], input));
        if constexpr (Format::kOffset) {
            const auto sums = part.count < kSpanSubs ? load_first<V8>(x.sums + at, part.count) : load_from<V8>(x.sums + at, part.done);
            offsets = V8::fma(s.offset[0], sums, offsets);
        }
    } else {  // a K-quant: always a whole span
        V8::store(scales, V8::mul(s.scale[0], Ops::twice_low(input)));
        V8::store(scales + 8, V8::mul(s.scale[1], Ops::twice_high(input)));
        if constexpr (Format::kOffset) {
            offsets = V8::fma(s.offset[0], V8::load(x.half_sums + 2 * at), offsets);
            offsets = V8::fma(s.offset[1], V8::load(x.half_sums + 2 * at + 8), offsets);
        }
    }
    return offsets;
}

// The products of sub-block j with 32 codes, in the format's own way if it has one.
template <class Ops, class Format, class Opened>
inline typename Ops::Sums dot(const Opened& span, int j, typename Ops::Codes x) {
    if constexpr (requires { Format::dot(span, j, x); }) {
        return Format::dot(span, j, x);
    } else {
        return Format::kSigned ? Ops::dot_signed(Format::codes(span, j), x) : Ops::dot_unsigned(Format::codes(span, j), x);
    }
}

// dots + scale * (codes of sub-block j . x), eighth by eighth of the codes.
template <class Ops, class Format, class Opened>
inline typename Ops::V8::Reg add_sub_block(const Opened& span, int j, const int8_t* x, const float* scales, typename Ops::V8::Reg dots) {
    using V8 = typename Ops::V8;
    const auto products = Ops::to_float(dot<Ops, Format>(span, j, Ops::load_codes(x)));
    return V8::fma(Format::kGroup == kSubBlock ? V8::broadcast(scales[j]) : Ops::pair(scales + 2 * j), products, dots);
}

// The same for sub-blocks j and j + 1 in one go, where the format knows how.
template <class Ops, class Format, class Opened>
inline typename Ops::V8::Reg add_two(const Opened& span, int j, const int8_t* x, const float* scales, typename Ops::V8::Reg dots) {
    if constexpr (requires { Format::dot_two(span, j, x); }) {
        return Ops::V8::fma(Ops::pair(scales + j), Ops::to_float(Format::dot_two(span, j, x)), dots);
    } else {
        dots = add_sub_block<Ops, Format>(span, j, x, scales, dots);
        return add_sub_block<Ops, Format>(span, j + 1, x + kSubBlock, scales, dots);
    }
}

// A stretch of a row: sub-blocks first .. last - 1. Its scales are all computed before its dot products: span by span, each would wait for
// the other.
constexpr size_t kStretch = 8 * kSpanSubs;

template <class Ops, class Format>
struct Stretch {
    static constexpr size_t kSpanBytes = sizeof(typename Format::Block) * (kSpan / Format::kBlock);
    float scales[kStretch * kSubBlock / Format::kGroup];  // of each group, the weights' times the activations'

};

// Fills the scales of R rows from their blocks at w (and x's at index `at`), adds the offset parts to `offsets`, and fetches what lies `ahead`.
template <class Ops, class Format, int R>
inline void prepare(const uint8_t* w, size_t row_bytes, size_t ahead, size_t first, size_t last, const Tokens& x, size_t at, Stretch<Ops, Format>* rows,
                    typename Ops::V8::Reg* offsets) {
    constexpr size_t kSpanBytes = Stretch<Ops, Format>::kSpanBytes, kGroupsPerSub = kSubBlock / Format::kGroup;
    const auto add_part = [&](const SpanPart& part) {
        const size_t from = part.sub - first;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* span = w + r * row_bytes + from * kSpanBytes / kSpanSubs;
            for (size_t byte = 0; byte < kSpanBytes; byte += 64) Ops::prefetch(span + ahead + byte);
            offsets[r] = span_scales<Ops, Format>(span, part, x, at + from, rows[r].scales + from * kGroupsPerSub, offsets[r]);
        }
    };
    size_t sub = first;
    for (; sub + kSpanSubs <= last; sub += kSpanSubs) add_part({sub, kSpanSubs, 0});
    if (Format::kBlock < kSpan && sub < last) add_part(span_part(first, sub, last));
}

// dots[r] + the stretch's integer products, for R rows; x stands at the stretch's first code.
template <class Ops, class Format, int R>
inline void stretch_dots(const uint8_t* w, size_t row_bytes, const Stretch<Ops, Format>* rows, size_t count, const int8_t* x, typename Ops::V8::Reg* dots) {
    constexpr size_t kSpanBytes = Stretch<Ops, Format>::kSpanBytes;
    typename OpenedSpan<Format>::Type spans[R];
    const auto open = [&] {
        for (int r = 0; r < R; ++r) OpenedSpan<Format>::open(w + r * row_bytes, spans[r]);
    };
    const auto two = [&](int j, size_t at) {
        for (int r = 0; r < R; ++r) dots[r] = add_two<Ops, Format>(spans[r], j, x + j * kSubBlock, rows[r].scales + at, dots[r]);
    };
    size_t sub = 0, at = 0;
    for (; sub + kSpanSubs <= count; sub += kSpanSubs, at += kSpan / Format::kGroup, w += kSpanBytes, x += kSpan) {
        open();
#pragma GCC unroll 4
        for (int j = 0; j < kSpanSubs; j += 2) two(j, at);
    }
    if (sub == count) return;
    open();
    int j = 0;
    for (; sub + j + 2 <= count; j += 2) two(j, at);
    if (sub + j == count) return;
    for (int r = 0; r < R; ++r) dots[r] = add_sub_block<Ops, Format>(spans[r], j, x + j * kSubBlock, rows[r].scales + at, dots[r]);
}

// R rows times token t. `ahead` is how far behind them in memory the rows lie that are fetched meanwhile.
template <class Ops, class Format, int R>
inline void gemv_tile(const uint8_t* w, size_t row_bytes, size_t ahead, const Tokens& x, size_t t, float* results) {
    using V8 = typename Ops::V8;
    const size_t subs = x.cols / kSubBlock;
    typename V8::Reg dots[R], offsets[R];
    for (int r = 0; r < R; ++r) dots[r] = offsets[r] = V8::zero();

    for (size_t first = 0; first < subs; first += kStretch) {
        const size_t last = subs - first < kStretch ? subs : first + kStretch, at = t * subs + first;
        Stretch<Ops, Format> rows[R];
        prepare<Ops, Format, R>(w, row_bytes, ahead, first, last, x, at, rows, offsets);
        stretch_dots<Ops, Format, R>(w, row_bytes, rows, last - first, x.codes + at * kSubBlock, dots);
        w += kStretch / kSpanSubs * Stretch<Ops, Format>::kSpanBytes;
    }
    for (int r = 0; r < R; ++r) results[r] = V8::reduce_sum(V8::add(dots[r], offsets[r]));
}

// R rows of floats times token t; the last vector is filled up with zeros.
template <class Ops, class Format, int R>
inline void gemv_float_tile(const uint8_t* w, size_t row_bytes, size_t ahead, const Tokens& x, size_t t, float* results) {
    using Element = typename Format::Element;
    constexpr size_t kLanes = Ops::kLanes;
    const float* values = x.values + t * x.cols;
    typename Ops::Reg sums[R];
    for (int r = 0; r < R; ++r) sums[r] = Ops::zero();
    size_t k = 0;
    for (; k + kLanes <= x.cols; k += kLanes) {
        const auto input = Ops::load(values + k);
        if (k * sizeof(Element) % 64 == 0) {
            for (int r = 0; r < R; ++r) Ops::prefetch(w + r * row_bytes + k * sizeof(Element) + ahead);
        }
        for (int r = 0; r < R; ++r) sums[r] = Ops::fma(Format::load((const Element*)(w + r * row_bytes) + k), input, sums[r]);
    }
    if (k < x.cols) {
        const auto input = Ops::load_partial(values + k, (int)(x.cols - k));
        for (int r = 0; r < R; ++r) {
            Element tail[kLanes] = {};
            memcpy(tail, w + r * row_bytes + k * sizeof(Element), (x.cols - k) * sizeof(Element));
            sums[r] = Ops::fma(Format::load(tail), input, sums[r]);
        }
    }
    for (int r = 0; r < R; ++r) results[r] = Ops::reduce_sum(sums[r]);
}

inline float* row_of(const Outputs& out, size_t token) { return out.data + (out.tokens == nullptr ? token : (size_t)out.tokens[token]) * out.stride; }

inline void put(const Outputs& out, size_t token, size_t row, const float* results, size_t count) {
    float* dst = row_of(out, token) + row;
    for (size_t i = 0; i < count; ++i) dst[i] = out.accumulate ? dst[i] + results[i] : results[i];
}

// Rows in tiles of R, what remains one by one; every token meets a tile while it is in the cache.
template <int R, class Tile, class Single>
inline void gemv_rows(const Rows& rows, const Tokens& x, const Outputs& out, Tile tile, Single single) {
    size_t row = 0;
    float results[R];
    const size_t tile_bytes = R * rows.row_bytes, ahead = (kAhead + tile_bytes - 1) / tile_bytes * tile_bytes;
    for (; row + R <= rows.count; row += R) {
        for (size_t t = 0; t < x.n; ++t) {
            tile(rows.data + row * rows.row_bytes, rows.row_bytes, ahead, x, t, results);
            put(out, t, row, results, R);
        }
    }
    for (; row < rows.count; ++row) {
        for (size_t t = 0; t < x.n; ++t) {
            single(rows.data + row * rows.row_bytes, rows.row_bytes, ahead, x, t, results);
            put(out, t, row, results, 1);
        }
    }
}

template <class Ops, class Format>
void gemv(const Rows& rows, const Tokens& x, const Outputs& out) {
    gemv_rows<4>(rows, x, out, gemv_tile<Ops, Format, 4>, gemv_tile<Ops, Format, 1>);
}

template <class Ops, class Format>
void gemv_float(const Rows& rows, const Tokens& x, const Outputs& out) {
    gemv_rows<4>(rows, x, out, gemv_float_tile<Ops, Format, 4>, gemv_float_tile<Ops, Format, 1>);
}

}  // namespace
}  // namespace moespan
