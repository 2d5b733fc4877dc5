// Causal attention over the paged KV cache with an online softmax (Dao et al., 2022, arXiv:2205.14135): nothing of size n x n is kept.
//
// A piece is a tile of query rows that share a KV head (row = token * group + head of the group, so that later rows see no fewer keys),
// against a run of keys. It walks the keys in blocks:
//
//   scores = q @ k^T          rows x 64, products of product-inl.h
//   softmax_update            running maximum and sum; scores become weights, and the output so far is rescaled
//   o += weights @ v
//
// A tile of many rows first unpacks the block's keys and values to float panels, once for all rows; a decode step, with the few rows of
// a group, reads them where they lie. When keys are split over threads, each piece leaves (maximum, sum, o) and merge_splits joins them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "isa/kernels.h"
#include "kv-inl.h"
#include "product-inl.h"

namespace moespan {
namespace {

constexpr size_t kKeyBlock = 64;
constexpr float kMinusInfinity = -__builtin_inff();

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
inline size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// The working memory of one piece, cut out of the thread's scratch.
struct AttentionTile {
    size_t rows, value_dim, padded_dim;  // padded to panels
    float* scores;                       // [rows][kKeyBlock]; after softmax_update the weights
    float* o;                            // [rows][padded_dim], not yet divided by sum
    float* max;                          // [rows]
    float* sum;                          // [rows]
    size_t* visible;                     // [rows]: how many keys of the block the row sees; never falls from row to row
};

// What reading a KV head takes besides.
struct HeadTile : AttentionTile {
    size_t head_dim;
    float* q;       // [rows][head_dim], times the scale
    float* keys;    // [kKeyBlock / 16][head_dim][16]
    float* values;  // [padded_dim / 16][kKeyBlock][16]
};

size_t tile_bytes(size_t rows, size_t value_dim) {
    const size_t floats = rows * (kKeyBlock + round_up(value_dim, kPanel) + 2);
    return floats * sizeof(float) + rows * sizeof(size_t) + 5 * 64;  // each part starts a cache line
}

size_t attention_scratch_bytes(size_t head_dim) {
    const size_t padded = round_up(head_dim, kPanel);
    return tile_bytes(kAttentionRows, head_dim) + (kAttentionRows + 2 * kKeyBlock) * padded * sizeof(float) + 3 * 64;
}

template <class T>
T* take(uint8_t*& memory, size_t count) {
    T* taken = (T*)memory;
    memory += round_up(count * sizeof(T), 64);
    return taken;
}

AttentionTile take_tile(uint8_t*& scratch, size_t rows, size_t value_dim) {
    AttentionTile tile;
    tile.rows = rows;
    tile.value_dim = value_dim;
    tile.padded_dim = round_up(value_dim, kPanel);
    tile.scores = take<float>(scratch, rows * kKeyBlock);
    tile.o = take<float>(scratch, rows * tile.padded_dim);
    tile.max = take<float>(scratch, rows);
    tile.sum = take<float>(scratch, rows);
    tile.visible = take<size_t>(scratch, rows);
    return tile;
}

HeadTile make_tile(size_t rows, size_t head_dim, uint8_t* scratch) {
    HeadTile tile{take_tile(scratch, rows, head_dim), head_dim, nullptr, nullptr, nullptr};
    tile.q = take<float>(scratch, rows * head_dim);
    tile.keys = take<float>(scratch, kKeyBlock * head_dim);
    tile.values = take<float>(scratch, kKeyBlock * tile.padded_dim);
    return tile;
}

// The index of a piece's row among the rows [n][heads] of q and out.
inline size_t global_row(const Attention& call, const AttentionPiece& piece, size_t row) {
    const size_t group = call.heads / call.kv.kv_heads, at = piece.row_begin + row;
    return at / group * call.heads + piece.kv_head * group + at % group;
}

// Nothing seen yet.
inline void clear_tile(const AttentionTile& tile) {
    for (size_t row = 0; row < tile.rows; ++row) {
        tile.max[row] = kMinusInfinity;
        tile.sum[row] = 0.0f;
    }
    memset(tile.o, 0, tile.rows * tile.padded_dim * sizeof(float));
}

template <class V>
void load_queries(const HeadTile& tile, const Attention& call, const AttentionPiece& piece) {
    const auto scale = V::broadcast(call.scale);
    for (size_t row = 0; row < tile.rows; ++row) {
        const float* q = call.q + global_row(call, piece, row) * tile.head_dim;
        for (size_t d = 0; d < tile.head_dim; d += V::kLanes) {
            const int n = (int)smaller(tile.head_dim - d, V::kLanes);
            V::store_partial(tile.q + row * tile.head_dim + d, V::mul(V::load_partial(q + d, n), scale), n);
        }
    }
}

// The token of a row sees the keys up to its own position.
inline void count_visible(const AttentionTile& tile, const Attention& call, const AttentionPiece& piece, size_t begin, size_t end) {
    const size_t group = call.heads / call.kv.kv_heads;
    size_t seen = call.start + piece.row_begin / group + 1, head = piece.row_begin % group;
    for (size_t row = 0; row < tile.rows; ++row) {
        tile.visible[row] = smaller(seen, end) > begin ? smaller(seen, end) - begin : 0;
        if (++head == group) ++seen, head = 0;
    }
}

// scores[:, column ..] = q @ keys for `columns` keys, a multiple of 16. Rows that see none of a panel skip it. fetch(c) runs before the
// panel of columns c .. c + 15: what it prefetches arrives while the panel is computed.
template <class V, class T, class Fetch>
void scores_tile(const HeadTile& tile, const Panels<T>& keys, size_t column, size_t columns, const Fetch& fetch) {
    constexpr size_t kRows = ProductShape<V>::kRows;
    for (size_t c = 0; c < columns; c += kPanel) {
        fetch(c);
        const T* panel = keys.data + c / kPanel * keys.panel_stride;
        for (size_t row = 0; row < tile.rows; row += kRows) {
            const size_t rows = smaller(kRows, tile.rows - row);
            if (tile.visible[row + rows - 1] <= column + c) continue;
            float* scores = tile.scores + row * kKeyBlock + column + c;
            product_rows<V>(rows, tile.q + row * tile.head_dim, tile.head_dim, panel, keys.row_stride, tile.head_dim, scores, kKeyBlock, false);
        }
    }
}

template <class V>
float max_of(const float* x, size_t count) {
    auto best = V::load(x);
    for (size_t i = V::kLanes; i < count; i += V::kLanes) best = V::max(best, V::load(x + i));
    return V::reduce_max(best);
}

// x = exp(x - max); returns the sum.
template <class V>
float exponentiate(float* x, size_t count, float max) {
    const auto shift = V::broadcast(max);
    auto sum = V::zero();
    for (size_t i = 0; i < count; i += V::kLanes) {
        const auto weight = V::exp(V::sub(V::load(x + i), shift));
        V::store(x + i, weight);
        sum = V::add(sum, weight);
    }
    return V::reduce_sum(sum);
}

// A row's new maximum: what was summed under the old one shrinks by exp(old - new).
template <class V>
void raise_max(const AttentionTile& tile, size_t row, float max) {
    const auto shrink = V::exp(V::broadcast(tile.max[row] - max));
    float* o = tile.o + row * tile.padded_dim;
    for (size_t d = 0; d < tile.padded_dim; d += V::kLanes) V::store(o + d, V::mul(V::load(o + d), shrink));
    tile.sum[row] *= V::reduce_max(shrink);
    tile.max[row] = max;
}

// Scores become weights exp(score - max), 0 for keys that the row does not see.
template <class V>
void softmax_update(const AttentionTile& tile) {
    for (size_t row = 0; row < tile.rows; ++row) {
        float* scores = tile.scores + row * kKeyBlock;
        const size_t visible = tile.visible[row], padded = round_up(visible, kPanel);
        for (size_t i = visible; i < padded; ++i) scores[i] = kMinusInfinity;
        memset(scores + padded, 0, (kKeyBlock - padded) * sizeof(float));
        if (visible == 0) continue;
        const float max = max_of<V>(scores, padded);
        if (max > tile.max[row]) raise_max<V>(tile, row, max);
        tile.sum[row] += exponentiate<V>(scores, padded, tile.max[row]);
    }
}

// o += weights[:, column ..] @ values for `count` keys. Keys that no row of a block of rows sees are left out.
// fetch(d) runs before the panel of dimensions d .. d + 15.
template <class V, class T, class Fetch>
void values_tile(const AttentionTile& tile, const Panels<T>& values, size_t column, size_t count, const Fetch& fetch) {
    constexpr size_t kRows = ProductShape<V>::kRows;
    for (size_t d = 0; d < tile.padded_dim; d += kPanel) {
        fetch(d);
        const T* panel = values.data + d / kPanel * values.panel_stride;
        for (size_t row = 0; row < tile.rows; row += kRows) {
            const size_t rows = smaller(kRows, tile.rows - row), visible = tile.visible[row + rows - 1];
            if (visible <= column) continue;
            const float* weights = tile.scores + row * kKeyBlock + column;
            float* o = tile.o + row * tile.padded_dim + d;
            product_rows<V>(rows, weights, kKeyBlock, panel, values.row_stride, smaller(count, visible - column), o, tile.padded_dim, true);
        }
    }
}

// Keys begin .. end - 1 of one head, and whether more follow in the same piece.
struct KeyBlock {
    size_t head, begin, end;
    bool last;
};

// One block of keys through float panels.
template <class V, class T>
void attend_unpacked(const HeadTile& tile, const PagedKv& kv, const KeyBlock& block) {
    const auto no_fetch = [](size_t) {};
    const size_t count = block.end - block.begin;
    unpack_keys<V, T>(kv, block.head, block.begin, block.end, tile.keys);
    scores_tile<V, float>(tile, {tile.keys, kPanel, kv.head_dim * kPanel}, 0, round_up(count, kPanel), no_fetch);
    softmax_update<V>(tile);
    unpack_values<V, T>(kv, block.head, block.begin, block.end, kKeyBlock, tile.values);
    values_tile<V, float>(tile, {tile.values, kPanel, kKeyBlock * kPanel}, 0, count, no_fetch);
}

template <class T>
void prefetch(const T* row, size_t rows, size_t stride, size_t count) {
    for (size_t r = 0; r < rows; ++r, row += stride) {
        for (size_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
    }
}

// One block of keys, read in place; head_dim is a multiple of 16. The block's values are fetched while the scores are computed, and the next
// block's keys while the values are summed: with pages all over the memory the processor's own prefetching reaches half the speed.
template <class V, class T>
void attend_in_place(const HeadTile& tile, const PagedKv& kv, const KeyBlock& block) {
    const size_t head_dim = kv.head_dim, page_size = kv.page_size;
    each_page(kv, block.begin, block.end, [&](size_t page, size_t slot, size_t position, size_t count) {
        const T* values = value_page<T>(kv, page, block.head) + slot * head_dim;
        scores_tile<V, T>(tile, {key_page<T>(kv, page, block.head) + slot, page_size, kPanel}, position - block.begin, round_up(count, kPanel),
                          [&](size_t c) { prefetch(values + c * head_dim, 1, 0, kPanel * head_dim); });
    });
    softmax_update<V>(tile);
    each_page(kv, block.begin, block.end, [&](size_t page, size_t slot, size_t position, size_t count) {
        const size_t next = block.last ? position : position + kKeyBlock;
        const T* keys = key_page<T>(kv, next / page_size, block.head) + next % page_size;
        values_tile<V, T>(tile, {value_page<T>(kv, page, block.head) + slot * head_dim, head_dim, kPanel}, position - block.begin, count,
                          [&](size_t d) { prefetch(keys + d * page_size, kPanel, page_size, count); });
    });
}

template <class V, class T>
void attend_keys(const HeadTile& tile, const Attention& call, const AttentionPiece& piece) {
    // Unpacking costs about as much as two more readings of the halves.
    const bool in_place = tile.rows <= 2 * ProductShape<V>::kRows && tile.head_dim % kPanel == 0;
    const auto attend_block = in_place ? attend_in_place<V, T> : attend_unpacked<V, T>;
    for (size_t begin = piece.key_begin; begin < piece.key_end; begin += kKeyBlock) {
        const size_t end = smaller(begin + kKeyBlock, piece.key_end);
        count_visible(tile, call, piece, begin, end);
        attend_block(tile, call.kv, {piece.kv_head, begin, end, end + kKeyBlock > piece.key_end});
    }
}

// out = o / sum where the piece saw all keys; otherwise the split's (maximum, sum, o) for merge_splits.
template <class V>
void finish_tile(const AttentionTile& tile, const Attention& call, const AttentionPiece& piece) {
    for (size_t row = 0; row < tile.rows; ++row) {
        const size_t at = global_row(call, piece, row);
        float* to = call.out + at * tile.value_dim;
        float divisor = tile.sum[row];
        if (piece.partials != nullptr) {
            float* partial = piece.partials + at * (tile.value_dim + 2);
            partial[0] = tile.max[row];
            partial[1] = tile.sum[row];
            to = partial + 2;
            divisor = 1.0f;
        }
        const auto factor = V::broadcast(1.0f / divisor);
        for (size_t d = 0; d < tile.value_dim; d += V::kLanes) {
            V::store_partial(to + d, V::mul(V::load(tile.o + row * tile.padded_dim + d), factor), (int)smaller(tile.value_dim - d, V::kLanes));
        }
    }
}

template <class V>
void attend(const Attention& call, const AttentionPiece& piece, uint8_t* scratch) {
    const HeadTile tile = make_tile(piece.row_end - piece.row_begin, call.kv.head_dim, scratch);
    clear_tile(tile);
    load_queries<V>(tile, call, piece);
    const auto attend_as = call.kv.half ? attend_keys<V, uint16_t> : attend_keys<V, float>;
    attend_as(tile, call, piece);
    finish_tile<V>(tile, call, piece);
}

// out [value_dim] = one row's splits joined: partials + i * stride holds (maximum, sum, o [value_dim]) of split i. A split of which the row
// sees no key has maximum -inf and weighs nothing.
template <class V>
void merge_splits(const float* partials, size_t splits, size_t stride, size_t value_dim, float* out) {
    float max = kMinusInfinity, sum = 0.0f;
    for (size_t i = 0; i < splits; ++i) max = partials[i * stride] > max ? partials[i * stride] : max;
    memset(out, 0, value_dim * sizeof(float));
    for (size_t i = 0; i < splits; ++i) {
        const float* partial = partials + i * stride;
        const auto weight = V::exp(V::broadcast(partial[0] - max));
        sum += V::reduce_max(weight) * partial[1];
        for (size_t d = 0; d < value_dim; d += V::kLanes) {
            const int n = (int)smaller(value_dim - d, V::kLanes);
            V::store_partial(out + d, V::fma(weight, V::load_partial(partial + 2 + d, n), V::load_partial(out + d, n)), n);
        }
    }
    for (size_t d = 0; d < value_dim; ++d) out[d] /= sum;
}

}  // namespace
}  // namespace moespan
