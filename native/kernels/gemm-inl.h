// Many tokens (prefill): a chunk of rows is unpacked once into cache-sized scratch, then meets every token in register tiles.
//
// A panel is P = Ops::kLanes rows side by side, so that a vector register holds one number of each row and nothing is summed across lanes:
//   codes    [cols / 4][P][4]     four codes of row 0, four of row 1, ...: one register, met by four codes of a token, broadcast
//   scales   [cols / kGroup][P]
//   offsets  [cols / kGroup][P]   only if the format has them
// A panel of a float format is [cols][P] floats.
#pragma once

#include "formats-inl.h"
#include "gemv-inl.h"
#include "isa/kernels.h"

namespace moespan {
namespace {

constexpr size_t kActivationBytes = 128 * 1024;  // activations of a token block: they stay in L2 beside the panels

// Whether a format's scales stay whole numbers until a sub-block's products are added (whole-inl.h).
template <class Format>
constexpr bool kWhole = requires { typename Format::WholeScales; };

template <class Ops, class Format>
struct Panel {
    static constexpr size_t P = Ops::kLanes, kGroupsPerSub = kSubBlock / Format::kGroup;
    uint8_t* codes;
    float *scales, *offsets, *units;

    static size_t bytes(size_t cols) {
        const size_t unit_count = kWhole<Format> ? 2 * ((cols + kSpan - 1) / kSpan) : 0;
        return cols * P + ((Format::kOffset ? 2 : 1) * cols / Format::kGroup + unit_count) * P * sizeof(float);
    }

    Panel(uint8_t* memory, size_t cols)
        : codes(memory), scales((float*)(memory + cols * P)), offsets(scales + cols / Format::kGroup * P), units(offsets + cols / Format::kGroup * P) {}

    // The scales and offsets of one row's span, which begins at sub-block `first`, to lane `lane`.
    void put_scales(size_t lane, const uint8_t* span, size_t first, int count) const {
        constexpr size_t kGroups = kSpan / Format::kGroup;
        const auto s = Format::scales(span, count);
        float scale[kGroups], offset[kGroups];
        for (int v = 0; v < s.kVectors; ++v) {
            Ops::V8::store(scale + 8 * v, s.scale[v]);
            Ops::V8::store(offset + 8 * v, s.offset[v]);
        }
        const size_t to = first * kGroupsPerSub * P + lane, groups = count * kGroupsPerSub;
        for (size_t g = 0; g < groups; ++g) scales[to + g * P] = scale[g];
        if constexpr (Format::kOffset) {
            for (size_t g = 0; g < groups; ++g) offsets[to + g * P] = offset[g];
        }
    }

    // The codes of sub-block j of each lane's span, which is sub-block `sub` of the row.
    void put_codes(const typename OpenedSpan<Format>::Type* spans, int j, size_t sub) const {
        for (size_t eight = 0; eight < P; eight += 8) {
            typename Ops::Codes rows[8];
            for (size_t r = 0; r < 8; ++r) rows[r] = Format::codes(spans[eight + r], j);
            Ops::store_transposed(rows, codes + sub * kSubBlock * P + 4 * eight, 4 * P);
        }
    }
};

// Up to P rows into a panel; the lanes of rows that are not there repeat the last one and are never stored.
template <class Ops, class Format>
void unpack_panel(const uint8_t* w, size_t row_bytes, size_t row_count, size_t cols, const Panel<Ops, Format>& panel) {
    constexpr size_t P = Ops::kLanes, kSpanBytes = sizeof(typename Format::Block) * (kSpan / Format::kBlock);
    const uint8_t* spans[P];
    for (size_t r = 0; r < P; ++r) spans[r] = w + (r < row_count ? r : row_count - 1) * row_bytes;
    const size_t subs = cols / kSubBlock;
    for (size_t first = 0; first < subs; first += kSpanSubs) {
        const int count = subs - first < kSpanSubs ? (int)(subs - first) : kSpanSubs;
        typename OpenedSpan<Format>::Type opened[P];
        for (size_t r = 0; r < P; ++r) {
            panel.put_scales(r, spans[r], first, count);
            OpenedSpan<Format>::open(spans[r], opened[r]);
        }
        for (int j = 0; j < count; ++j) panel.put_codes(opened, j, first + j);
        for (size_t r = 0; r < P; ++r) spans[r] += kSpanBytes;
    }
}

// T tokens from t on times one panel; sums[i] has a lane for each row.
template <class Ops, class Format, int T>
inline void panel_tile(const Panel<Ops, Format>& panel, const Tokens& x, size_t t, typename Ops::Reg* sums) {
    constexpr size_t P = Ops::kLanes;
    constexpr int kGroups = kSubBlock / Format::kGroup, kSteps = Format::kGroup / 4;
    const size_t subs = x.cols / kSubBlock;
    typename Ops::Reg acc[T];
    for (int i = 0; i < T; ++i) acc[i] = Ops::zero();
    const uint8_t* w = panel.codes;
    const float *scale = panel.scales, *offset = panel.offsets;
    const float* group_sums = Format::kGroup == kSubBlock ? x.sums : x.half_sums;

    for (size_t sub = 0; sub < subs; ++sub) {
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
            const int8_t* codes[T];
            for (int i = 0; i < T; ++i) codes[i] = x.codes + (t + i) * x.cols + sub * kSubBlock + g * Format::kGroup;
            typename Ops::Reg dots[T];
            Ops::template dot_panel<T, kSteps, Format::kSigned, Format::kMaxCode>(w, codes, dots);
            const auto s = Ops::load(scale);
            for (int i = 0; i < T; ++i) {
                acc[i] = Ops::fma(dots[i], Ops::mul(s, Ops::broadcast(x.scales[(t + i) * subs + sub])), acc[i]);
                if constexpr (Format::kOffset) {
                    acc[i] = Ops::fma(Ops::load(offset), Ops::broadcast(group_sums[((t + i) * subs + sub) * kGroups + g]), acc[i]);
                }
            }
            w += Format::kGroup * P;
            scale += P;
            offset += P;
        }
    }
    for (int i = 0; i < T; ++i) sums[i] = acc[i];
}

template <class Ops>
size_t float_panel_bytes(size_t cols) {
    return cols * Ops::kLanes * sizeof(float);
}

// `count` (at most a vector of) elements of each row from column k on, turned to [count][P].
template <class Ops, class Format>
inline void turn_columns(const uint8_t* w, size_t row_bytes, size_t row_count, size_t k, size_t count, float* turned) {
    using Element = typename Format::Element;
    constexpr size_t P = Ops::kLanes;
    float square[P][P], columns[P][P];
    for (size_t r = 0; r < P; ++r) {
        const Element* elements = (const Element*)(w + (r < row_count ? r : row_count - 1) * row_bytes) + k;
        Element tail[P] = {};
        if (count < P) memcpy(tail, elements, count * sizeof(Element));
        Ops::store(square[r], Format::load(count < P ? tail : elements));
    }
    for (size_t c = 0; c < P; c += 8) {
        for (size_t eight = 0; eight < P; eight += 8) {
            typename Ops::Codes rows[8];
            for (size_t r = 0; r < 8; ++r) rows[r] = Ops::load_codes(&square[eight + r][c]);
            Ops::store_transposed(rows, (uint8_t*)&columns[c][eight], sizeof(columns[0]));
        }
    }
    memcpy(turned, columns, count * sizeof(columns[0]));
}

template <class Ops, class Format>
void unpack_float_panel(const uint8_t* w, size_t row_bytes, size_t row_count, size_t cols, float* panel) {
    constexpr size_t P = Ops::kLanes;
    size_t k = 0;
    for (; k + P <= cols; k += P) turn_columns<Ops, Format>(w, row_bytes, row_count, k, P, panel + k * P);
    if (k < cols) turn_columns<Ops, Format>(w, row_bytes, row_count, k, cols - k, panel + k * P);
}

template <class Ops, int T>
inline void float_panel_tile(const float* panel, const Tokens& x, size_t t, typename Ops::Reg* sums) {
    typename Ops::Reg acc[T];
    for (int i = 0; i < T; ++i) acc[i] = Ops::zero();
    const float* values = x.values + t * x.cols;
    for (size_t k = 0; k < x.cols; ++k) {
        const auto w = Ops::load(panel + k * Ops::kLanes);
        for (int i = 0; i < T; ++i) acc[i] = Ops::fma(w, Ops::broadcast(values[i * x.cols + k]), acc[i]);
    }
    for (int i = 0; i < T; ++i) sums[i] = acc[i];
}

// T tokens' results of a panel to their place.
template <class Ops, int T>
inline void put_panel(const Outputs& out, size_t t, size_t row, size_t row_count, const typename Ops::Reg* sums) {
    for (int i = 0; i < T; ++i) {
        float results[Ops::kLanes];
        Ops::store(results, sums[i]);
        put(out, t + i, row, results, row_count);
    }
}

// The tokens first .. last - 1 in tiles of T, then of T / 2, ... 1. `tile` is called with an integral constant for T.
template <int T, class Tile>
inline void in_tiles(size_t first, size_t last, const Tile& tile) {
    for (; first + T <= last; first += T) tile.template operator()<T>(first);
    if constexpr (T > 1) in_tiles<T / 2>(first, last, tile);
}

// Unpack all panels of the chunk; then, a token block at a time, each panel (in L1) meets the block (in L2).
template <class Ops, int T, class Unpack, class Tile>
inline void gemm_chunk(const Rows& rows, const Tokens& x, size_t token_bytes, const Unpack& unpack, const Tile& tile) {
    constexpr size_t P = Ops::kLanes;
    const size_t block = kActivationBytes / token_bytes / T * T;
    const size_t tokens = block < T ? T : block;
    for (size_t row = 0; row < rows.count; row += P) unpack(row / P, row, rows.count - row < P ? rows.count - row : P);
    for (size_t first = 0; first < x.n; first += tokens) {
        const size_t last = x.n - first < tokens ? x.n : first + tokens;
        for (size_t row = 0; row < rows.count; row += P) {
            const size_t count = rows.count - row < P ? rows.count - row : P;
            in_tiles<T>(first, last, [&]<int tile_tokens>(size_t t) { tile.template operator()<tile_tokens>(row / P, row, count, t); });
        }
    }
}

template <class Ops, class Format>
void gemm(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* scratch) {
    const size_t bytes = Panel<Ops, Format>::bytes(x.cols);
    gemm_chunk<Ops, Ops::kTokens>(
        rows, x, x.cols,
        [&](size_t p, size_t row, size_t count) {
            unpack_panel(rows.data + row * rows.row_bytes, rows.row_bytes, count, x.cols, Panel<Ops, Format>(scratch + p * bytes, x.cols));
        },
        [&]<int T>(size_t p, size_t row, size_t count, size_t t) {
            typename Ops::Reg sums[T];
            panel_tile<Ops, Format, T>(Panel<Ops, Format>(scratch + p * bytes, x.cols), x, t, sums);
            put_panel<Ops, T>(out, t, row, count, sums);
        });
}

template <class Ops, class Format>
void gemm_float(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* scratch) {
    const size_t floats = x.cols * Ops::kLanes;
    float* panels = (float*)scratch;
    gemm_chunk<Ops, 8>(
        rows, x, x.cols * sizeof(float),
        [&](size_t p, size_t row, size_t count) {
            unpack_float_panel<Ops, Format>(rows.data + row * rows.row_bytes, rows.row_bytes, count, x.cols, panels + p * floats);
        },
        [&]<int T>(size_t p, size_t row, size_t count, size_t t) {
            typename Ops::Reg sums[T];
            float_panel_tile<Ops, T>(panels + p * floats, x, t, sums);
            put_panel<Ops, T>(out, t, row, count, sums);
        });
}

}  // namespace
}  // namespace moespan
