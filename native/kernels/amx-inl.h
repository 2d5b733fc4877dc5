// Many tokens on AMX: weights are opened to bf16 tiles in the cache (open-inl.h), and meet tiles of bf16 activations; sums stay float32.
//
// One product of tiles takes A [16 tokens][32 columns], B [16 pairs of columns][16 rows of the matrix][2] and adds to C [16 tokens][16 rows]. A strip in
// tile order has the 16 rows side by side already: 4 columns of it, a step, become two rows of B. Bytes 0 and 2 of each row's four are widened
// in place to 16 bits, and so are 1 and 3, hence the order of columns within each four is 0 2 1 3, in A as well.
#pragma once

#include "activation-inl.h"
#include "open-inl.h"
#include "tiles_iq-inl.h"
#include "tiles_k-inl.h"

namespace moespan {
namespace {

constexpr size_t kOpenStrips = 2, kDepth = 512;      // strips and columns that are opened at once: 32 KB of L1
constexpr size_t kFewTokens = 32, kFewDepth = 256;  // for so few tokens opening outweighs the products: 16 KB, which stay there
constexpr size_t kTokenBlock = 512;                  // tokens whose sums stay in L2
constexpr size_t kTilesFrom = 8;                     // tokens from which tiles are the faster (measured on a Xeon with AMX)

// Columns of one row to its line of as many tiles of A.
template <class Ops>
void put_bf16(const float* x, size_t cols, uint16_t* to) {
    for (size_t k = 0; k < cols; k += kTileColumns, to += kTileHalves) Ops::round_bf16(x + k, to);
}

// The scratch of a call: some strips opened, the powers of all, and the sums [strip][tokens, up to a whole tile][16] of a block of tokens.
struct TileScratch {
    uint16_t* opened;
    RowPowers* powers;
    float* sums;

    static constexpr size_t kOpenedBytes = kOpenStrips * kTile * kDepth * sizeof(uint16_t);
    static size_t padded(size_t n) { return ((n < kTokenBlock ? n : kTokenBlock) + kTile - 1) / kTile * kTile; }

    TileScratch(uint8_t* memory, size_t strips)
        : opened((uint16_t*)memory), powers((RowPowers*)(memory + kOpenedBytes)), sums((float*)(powers + strips)) {}
    static size_t bytes(size_t strips, size_t n) {
        return kOpenedBytes + strips * (sizeof(RowPowers) + padded(n) * kTile * sizeof(float));
    }
};

// Where the sums of some columns begin and end: in the registers, which hold those of the columns before, or in memory.
struct SumsAt {
    bool zero, load, store;
};

// sums [A][16 tokens][16], and B of them `sums_apart` from each other, += A x B tiles over `depth` tiles of columns.
// x: the tiles of 16 tokens, and x_apart behind them those of the next 16.
template <class Ops, int A, int B>
inline void multiply_tiles(typename Ops::TileRegisters& tiles, const uint16_t* x, size_t x_apart, const uint16_t* w, size_t depth, SumsAt at, float* sums,
                           size_t sums_apart) {
    constexpr size_t kBytes = kTileColumns * sizeof(uint16_t), kSums = kTile * kTile;
    if (at.zero) {
        tiles.template zero<0>();
        if constexpr (B > 1) tiles.template zero<1>();
        if constexpr (A > 1) tiles.template zero<2>();
        if constexpr (A > 1 && B > 1) tiles.template zero<3>();
    } else if (at.load) {
        tiles.template load<0>(sums, kBytes);
        if constexpr (B > 1) tiles.template load<1>(sums + sums_apart, kBytes);
        if constexpr (A > 1) tiles.template load<2>(sums + kSums, kBytes);
        if constexpr (A > 1 && B > 1) tiles.template load<3>(sums + sums_apart + kSums, kBytes);
    }
    for (size_t k = 0; k < depth; ++k, x += kTileHalves, w += 2 * kTileHalves) {
        tiles.template load<4>(x, kBytes);
        tiles.template load<6>(w, kBytes);
        tiles.template multiply<0, 4, 6>();
        if constexpr (A > 1) {
            tiles.template load<5>(x + x_apart, kBytes);
            tiles.template multiply<2, 5, 6>();
        }
        if constexpr (B > 1) {
            tiles.template load<7>(w + kTileHalves, kBytes);
            tiles.template multiply<1, 4, 7>();
            if constexpr (A > 1) tiles.template multiply<3, 5, 7>();
        }
    }
    if (!at.store) return;
    tiles.template store<0>(sums);
    if constexpr (B > 1) tiles.template store<1>(sums + sums_apart);
    if constexpr (A > 1) tiles.template store<2>(sums + kSums);
    if constexpr (A > 1 && B > 1) tiles.template store<3>(sums + sums_apart + kSums);
}

// A block of tokens times B opened strips.
template <class Ops, int B>
inline void multiply_strips(typename Ops::TileRegisters& tiles, const uint16_t* opened, const uint16_t* x, size_t x_apart, size_t depth, size_t tokens,
                            SumsAt at, float* sums) {
    const size_t sums_apart = TileScratch::padded(tokens) * kTile;
    size_t t = 0;
    for (; t + kTile < tokens; t += 2 * kTile) {
        multiply_tiles<Ops, 2, B>(tiles, x + t / kTile * x_apart, x_apart, opened, depth, at, sums + t * kTile, sums_apart);
    }
    if (t < tokens) multiply_tiles<Ops, 1, B>(tiles, x + t / kTile * x_apart, x_apart, opened, depth, at, sums + t * kTile, sums_apart);
}

// The strips of a call, at(i) the i-th, and the columns that each has.
template <class Tiles, class At>
struct TileStrips {
    const At& at;
    size_t count, cols;

    const uint8_t* codes(size_t i, size_t sub) const { return at(i) + sub * Tiles::kBits * kLine; }
    const uint8_t* scales(size_t i, size_t sub) const { return at(i) + Strip<Tiles>::code_bytes(cols) + sub * Tiles::kSubScaleBytes; }
};

// Strips i .. i + open - 1, their `depth` sub-blocks from `sub` on, opened and met by the tokens t .. t + tokens - 1. What is opened next is at strip
// `next` from `next_sub` on, and fetched meanwhile.
template <class Ops, class Tiles, class Strips>
inline void multiply_opened(typename Ops::TileRegisters& tiles, const TileScratch& scratch, const Strips& strips, size_t i, size_t sub, size_t depth, size_t next,
                            size_t next_sub, const Tokens& x, size_t t, size_t tokens, SumsAt at) {
    const size_t open = strips.count - i < kOpenStrips ? strips.count - i : kOpenStrips;
    for (size_t b = 0; b < open; ++b) {
        const ptrdiff_t ahead = next + b < strips.count ? (ptrdiff_t)((uintptr_t)strips.codes(next + b, next_sub) - (uintptr_t)strips.codes(i + b, sub)) : 0;
        open_strip<Ops, Tiles>(strips.codes(i + b, sub), strips.scales(i + b, sub), (int)depth, scratch.powers[i + b], ahead,
                               scratch.opened + b * kTileHalves, 2 * kTileHalves);
    }
    const auto multiply = open == 2 ? multiply_strips<Ops, 2> : multiply_strips<Ops, 1>;
    multiply(tiles, scratch.opened, x.bf16 + t * x.cols + sub * kTileHalves, kTile * x.cols, depth, tokens, at,
             scratch.sums + i * TileScratch::padded(tokens) * kTile);
}

// The sums of up to 32 tokens stay in the registers, from the first to the last column of two strips.
template <class Ops, class Tiles, class Strips>
void sum_few_tokens(typename Ops::TileRegisters& tiles, const TileScratch& scratch, const Strips& strips, const Tokens& x, size_t t, size_t tokens) {
    constexpr size_t kStep = kFewDepth / kSubBlock;
    const size_t subs = x.cols / kSubBlock;
    for (size_t i = 0; i < strips.count; i += kOpenStrips) {
        for (size_t sub = 0; sub < subs; sub += kStep) {
            const bool last = sub + kStep >= subs;
            multiply_opened<Ops, Tiles>(tiles, scratch, strips, i, sub, last ? subs - sub : kStep, last ? i + kOpenStrips : i, last ? 0 : sub + kStep, x, t,
                                        tokens, {sub == 0, false, last});
        }
    }
}

// The sums of more tokens go back to memory after every 512 columns, so that all strips meet these columns of the tokens while they are in L2.
template <class Ops, class Tiles, class Strips>
void sum_many_tokens(typename Ops::TileRegisters& tiles, const TileScratch& scratch, const Strips& strips, const Tokens& x, size_t t, size_t tokens) {
    constexpr size_t kStep = kDepth / kSubBlock;
    const size_t subs = x.cols / kSubBlock;
    for (size_t sub = 0; sub < subs; sub += kStep) {
        const size_t depth = subs - sub < kStep ? subs - sub : kStep;
        for (size_t i = 0; i < strips.count; i += kOpenStrips) {
            const bool last = i + kOpenStrips >= strips.count;
            multiply_opened<Ops, Tiles>(tiles, scratch, strips, i, sub, depth, last ? 0 : i + kOpenStrips, last ? sub + depth : sub, x, t, tokens,
                                        {sub == 0, true, true});
        }
    }
}

// Calls put(t, tokens) for each block of tokens, when its sums are there.
template <class Ops, class Tiles, class At, class Put>
inline void for_blocks(const At& at, size_t count, const Tokens& x, const TileScratch& scratch, const Put& put) {
    const TileStrips<Tiles, At> strips{at, count, x.cols};
    for (size_t i = 0; i < count; ++i) find_powers<Ops, Tiles>(strips.scales(i, 0), x.cols / kSubBlock, scratch.powers[i]);
    typename Ops::TileRegisters tiles;
    for (size_t t = 0; t < x.n; t += kTokenBlock) {
        const size_t tokens = x.n - t < kTokenBlock ? x.n - t : kTokenBlock;
        if (tokens <= kFewTokens) {
            sum_few_tokens<Ops, Tiles>(tiles, scratch, strips, x, t, tokens);
        } else {
            sum_many_tokens<Ops, Tiles>(tiles, scratch, strips, x, t, tokens);
        }
        put(t, tokens);
    }
}

// sums [tokens][16] of a strip, without their powers, to the tokens from t on.
template <class Ops>
inline void put_sums(const float* sums, const RowPowers& powers, const Outputs& out, size_t t, size_t tokens, size_t row, size_t row_count) {
    for (size_t i = 0; i < tokens; ++i, sums += kTile) {
        float results[kTile], *to = row_of(out, t + i) + row;
        for (size_t r = 0; r < kTile; r += Ops::kLanes) {
            auto values = Ops::mul(Ops::load(sums + r), Ops::load(powers.sum + r));
            if (row_count == kTile && out.accumulate) values = Ops::add(values, Ops::load(to + r));
            Ops::store(row_count == kTile ? to + r : results + r, values);
        }
        if (row_count < kTile) put(out, t + i, row, results, row_count);
    }
}

// outputs (+)= x @ rows^T; Rows::data is a strip, and row_bytes a strip's; reads x.bf16, whose last tiles may have rows of whatever value.
template <class Ops, class Tiles>
void gemm_tiles(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* memory) {
    const size_t strips = (rows.count + kTile - 1) / kTile;
    const TileScratch scratch(memory, strips);
    const auto at = [&](size_t i) { return rows.data + i * rows.row_bytes; };
    for_blocks<Ops, Tiles>(at, strips, x, scratch, [&](size_t t, size_t tokens) {
        for (size_t i = 0; i < strips; ++i) {
            const size_t row = i * kTile, count = rows.count - row < kTile ? rows.count - row : kTile;
            put_sums<Ops>(scratch.sums + i * TileScratch::padded(tokens) * kTile, scratch.powers[i], out, t, tokens, row, count);
        }
    });
}

// silu(gate) * up of a strip, from the sums of both.
template <class Ops>
inline void put_gated(const float* gate, const float* up, const RowPowers* powers, float* to, size_t stride, size_t tokens, size_t count) {
    for (size_t i = 0; i < tokens; ++i, gate += kTile, up += kTile, to += stride) {
        float results[kTile];
        for (size_t r = 0; r < kTile; r += Ops::kLanes) {
            const auto g = Ops::mul(Ops::load(gate + r), Ops::load(powers[0].sum + r)), u = Ops::mul(Ops::load(up + r), Ops::load(powers[1].sum + r));
            Ops::store(count == kTile ? to + r : results + r, silu_times<Ops>(g, u));
        }
        for (size_t r = 0; count < kTile && r < count; ++r) to[r] = results[r];
    }
}

// out [n, gate.count] = silu(x @ gate^T) * (x @ up^T): strips of both, side by side, are what is opened at once.
template <class Ops, class Tiles>
void gate_tiles(const Rows& gate, const Rows& up, const Tokens& x, float* out, uint8_t* memory) {
    const size_t strips = (gate.count + kTile - 1) / kTile;
    const TileScratch scratch(memory, 2 * strips);
    const auto at = [&](size_t i) { return (i % 2 == 0 ? gate : up).data + i / 2 * gate.row_bytes; };
    for_blocks<Ops, Tiles>(at, 2 * strips, x, scratch, [&](size_t t, size_t tokens) {
        const size_t apart = TileScratch::padded(tokens) * kTile;
        for (size_t i = 0; i < strips; ++i) {
            const size_t row = i * kTile, count = gate.count - row < kTile ? gate.count - row : kTile;
            const float* sums = scratch.sums + 2 * i * apart;
            put_gated<Ops>(sums, sums + apart, scratch.powers + 2 * i, out + t * gate.count + row, gate.count, tokens, count);
        }
    });
}

template <class Ops>
size_t tile_scratch_bytes(size_t rows, size_t n) {
    return TileScratch::bytes((rows + kTile - 1) / kTile, n);
}

template <class Ops, class Tiles>
constexpr Bf16Product tile_product() {
    return {Tiles::kType, gemm_tiles<Ops, Tiles>, gate_tiles<Ops, Tiles>};
}

template <class Ops>
constexpr Bf16Product kTileProducts[] = {
    tile_product<Ops, Q4_0Tiles<Ops>>(),   tile_product<Ops, Q4_1Tiles<Ops>>(),   tile_product<Ops, Q5_0Tiles<Ops>>(), tile_product<Ops, Q5_1Tiles<Ops>>(),
    tile_product<Ops, Q8_0Tiles<Ops>>(),   tile_product<Ops, Q4_KTiles<Ops>>(),   tile_product<Ops, Q5_KTiles<Ops>>(), tile_product<Ops, Q6_KTiles<Ops>>(),
    tile_product<Ops, Q2_KTiles<Ops>>(),   tile_product<Ops, Q3_KTiles<Ops>>(),   tile_product<Ops, IQ4_NLTiles<Ops>>(), tile_product<Ops, IQ4_XSTiles<Ops>>(),
    tile_product<Ops, MXFP4Tiles<Ops>>(),
};

template <class Ops>
constexpr Bf16Kernels make_bf16_kernels() {
    return {kTileProducts<Ops>, sizeof(kTileProducts<Ops>) / sizeof(Bf16Product), kTilesFrom, tile_scratch_bytes<Ops>, put_bf16<Ops>};
}

}  // namespace
}  // namespace moespan
