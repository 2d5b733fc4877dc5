// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1) in its absorbed form: all heads share one key, a latent of the cache, and
// its first value_dim values are the value too. Tiles, softmax and splits are those of attention-inl.h.
//
// The latents lie as they are, [page_size][head_dim]: nothing of them is transposed and both products read the same floats, of which a block
// of keys is converted once for all rows of a piece.
//
//   scores^T = latents @ q^T      64 x 16, with the tile's queries packed once in panels of 16 rows; then turned
//   o += weights @ latents        16 columns of the latents, as they lie, are a panel
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "attention-inl.h"
#include "isa/kernels.h"
#include "kv-inl.h"
#include "product-inl.h"

namespace moespan {
namespace {

constexpr size_t kDepthBlock = 128;  // of a panel of queries, so that it stays in L1 while all keys of a block meet it: 8 KiB

struct LatentTile : AttentionTile {
    size_t head_dim, stride;  // of a latent, and of one as floats: padded to panels
    float* q;                 // [rows / 16, rounded up][head_dim][16], times the scale
    float* latents;           // [kKeyBlock][stride], with zeros beyond head_dim
    float* turned;            // [kKeyBlock][16]: one panel's scores, transposed
};

size_t latent_scratch_bytes(size_t head_dim, size_t value_dim) {
    static_assert(kLatentRows % kPanel == 0);
    const size_t stride = round_up(head_dim, kPanel);
    const size_t floats = kLatentRows * head_dim + kKeyBlock * (stride + kPanel);
    return tile_bytes(kLatentRows, value_dim) + floats * sizeof(float) + 3 * 64;
}

LatentTile make_latent_tile(size_t rows, const PagedKv& kv, uint8_t* scratch) {
    const size_t padded = round_up(rows, kPanel);
    LatentTile tile{take_tile(scratch, padded, kv.value_dim), kv.head_dim, round_up(kv.head_dim, kPanel), nullptr, nullptr, nullptr};
    tile.rows = rows;
    tile.q = take<float>(scratch, padded * kv.head_dim);
    tile.latents = take<float>(scratch, kKeyBlock * tile.stride);
    tile.turned = take<float>(scratch, kKeyBlock * kPanel);
    return tile;
}

// to [cols][rows] = from [rows][cols], for 8 rows and any columns.
template <class Ops>
void transpose_eight(const float* const* from, size_t cols, float* to, size_t to_stride) {
    const size_t whole = cols / 8 * 8;
    for (size_t c = 0; c < whole; c += 8) {
        typename Ops::Codes rows[8];
        for (size_t r = 0; r < 8; ++r) rows[r] = Ops::load_codes(from[r] + c);
        Ops::store_transposed(rows, (uint8_t*)(to + c * to_stride), to_stride * sizeof(float));
    }
    for (size_t c = whole; c < cols; ++c) {
        for (size_t r = 0; r < 8; ++r) to[c * to_stride + r] = from[r][c];
    }
}

// Rows that are missing in the last panel repeat the last one; their scores are never read.
template <class Ops>
void pack_queries(const LatentTile& tile, const Attention& call, const AttentionPiece& piece) {
    const size_t padded = round_up(tile.rows, kPanel);
    for (size_t row = 0; row < padded; row += 8) {
        const float* from[8];
        for (size_t r = 0; r < 8; ++r) from[r] = call.q + global_row(call, piece, smaller(row + r, tile.rows - 1)) * tile.head_dim;
        transpose_eight<Ops>(from, tile.head_dim, tile.q + row / kPanel * kPanel * tile.head_dim + row % kPanel, kPanel);
    }
    const auto scale = Ops::broadcast(call.scale);
    for (size_t i = 0; i < padded * tile.head_dim; i += Ops::kLanes) Ops::store(tile.q + i, Ops::mul(Ops::load(tile.q + i), scale));
}

template <class T>
T* latent_at(const PagedKv& kv, size_t page, size_t slot) {
    return (T*)kv.k + ((size_t)kv.pages[page] * kv.page_size + slot) * kv.head_dim;
}

// Latents begin .. end - 1 as floats.
template <class V, class T>
void convert_latents(const LatentTile& tile, const PagedKv& kv, size_t begin, size_t end) {
    const size_t whole = tile.head_dim / V::kLanes * V::kLanes;
    each_page(kv, begin, end, [&](size_t page, size_t slot, size_t position, size_t count) {
        const T* from = latent_at<T>(kv, page, slot);
        float* to = tile.latents + (position - begin) * tile.stride;
        for (size_t i = 0; i < count; ++i, from += tile.head_dim, to += tile.stride) {
            for (size_t d = 0; d < whole; d += V::kLanes) V::store(to + d, load_floats<V>(from + d));
            for (size_t d = whole; d < tile.stride; d += V::kLanes) {
                V::store(to + d, load_floats_partial<V>(from + d, d < tile.head_dim ? (int)(tile.head_dim - d) : 0));
            }
        }
    });
}

// turned [keys][16] = latents @ the panel of queries.
template <class V>
void turned_scores(const LatentTile& tile, const float* panel, size_t keys) {
    constexpr size_t kRows = ProductShape<V>::kRows;
    for (size_t d = 0; d < tile.head_dim; d += kDepthBlock) {
        const size_t depth = smaller(kDepthBlock, tile.head_dim - d);
        for (size_t key = 0; key < keys; key += kRows) {
            product_rows<V>(smaller(kRows, keys - key), tile.latents + key * tile.stride + d, tile.stride, panel + d * kPanel, kPanel, depth,
                            tile.turned + key * kPanel, kPanel, d > 0);
        }
    }
}

// scores = q @ latents^T for the keys that some row of a panel sees.
template <class Ops>
void latent_scores(const LatentTile& tile) {
    for (size_t row = 0; row < tile.rows; row += kPanel) {
        const size_t keys = tile.visible[smaller(row + kPanel, tile.rows) - 1];
        turned_scores<Ops>(tile, tile.q + row * tile.head_dim, keys);
        for (size_t key = 0; key < keys; key += 8) {
            const float* from[8];
            for (size_t r = 0; r < 8; ++r) from[r] = tile.turned + (key + r) * kPanel;
            transpose_eight<Ops>(from, kPanel, tile.scores + row * kKeyBlock + key, kKeyBlock);
        }
    }
}

template <class Ops, class T>
void attend_latents(const LatentTile& tile, const Attention& call, const AttentionPiece& piece) {
    for (size_t begin = piece.key_begin; begin < piece.key_end; begin += kKeyBlock) {
        const size_t end = smaller(begin + kKeyBlock, piece.key_end);
        count_visible(tile, call, piece, begin, end);
        convert_latents<Ops, T>(tile, call.kv, begin, end);
        latent_scores<Ops>(tile);
        softmax_update<Ops>(tile);
        values_tile<Ops, float>(tile, {tile.latents, tile.stride, kPanel}, 0, end - begin, [](size_t) {});
    }
}

template <class Ops>
void attend_latent(const Attention& call, const AttentionPiece& piece, uint8_t* scratch) {
    const LatentTile tile = make_latent_tile(piece.row_end - piece.row_begin, call.kv, scratch);
    clear_tile(tile);
    pack_queries<Ops>(tile, call, piece);
    const auto attend_as = call.kv.half ? attend_latents<Ops, uint16_t> : attend_latents<Ops, float>;
    attend_as(tile, call, piece);
    finish_tile<Ops>(tile, call, piece);
}

template <class V, class T>
void store_latents_as(const PagedKv& kv, const float* latents, size_t begin, size_t count) {
    each_page(kv, begin, begin + count, [&](size_t page, size_t slot, size_t position, size_t run) {
        convert_row<V>(latents + (position - begin) * kv.head_dim, latent_at<T>(kv, page, slot), run * kv.head_dim);
    });
}

template <class V>
void store_latents(const PagedKv& kv, const float* latents, size_t begin, size_t count) {
    const auto store = kv.half ? store_latents_as<V, uint16_t> : store_latents_as<V, float>;
    store(kv, latents, begin, count);
}

}  // namespace
}  // namespace moespan
