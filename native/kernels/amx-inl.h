// Many tokens on AMX: weights are opened to bf16 tiles in the cache (open-inl.h), and meet tiles of bf16 activations; sums stay float32.
//
// One product of tiles takes A [16 tokens][32 columns], B [16 pairs of columns][16 rows of the matrix][2] and adds to C [16 tokens][16 rows]. A strip in
// tile order has the 16 rows side by side already: 4 columns of it, a step, become two rows of B. Bytes 0 and 2 of each row's four are widened
// in place to 16 bits, and so are 1 and 3, hence the order of columns within each four is 0 2 1 3, in A as well.
#pragma once

#include "activation-inl.h"
#include "open-inl.h"
#include "open_rows-inl.h"
#include "tiles_iq-inl.h"
#include "tiles_k-inl.h"

namespace moespan {
namespace {

constexpr size_t kTallTiles = 6;      // tiles of tokens whose sums stay in the registers: 96 tokens
constexpr size_t kRing = 8;           // tiles of one strip that are opened ahead of their products for them: 8 KB of L1
constexpr size_t kPairDepth = 16;     // of two strips, sub-blocks that more tokens meet at once: 32 KB
constexpr size_t kTokenBlock = 512;   // tokens whose sums stay in L2
constexpr size_t kTilesFrom = 8;      // tokens from which tiles are the faster (measured on a Xeon with AMX)

// Columns of one row to its line of as many tiles of A.
template <class Ops>
void put_bf16(const float* x, size_t cols, uint16_t* to) {
    for (size_t k = 0; k < cols; k += kTileColumns, to += kTileHalves) Ops::round_bf16(x + k, to);
}

// The scratch of a call: what is opened, the powers of all strips, and the sums [strip][tokens, up to a whole tile][16] of a block of tokens.
struct TileScratch {
    uint16_t* opened;
    RowPowers* powers;
    float* sums;

    static constexpr size_t kOpenedTiles = 2 * kPairDepth > kRing ? 2 * kPairDepth : kRing, kOpenedBytes = kOpenedTiles * kTileHalves * sizeof(uint16_t);
    static size_t padded(size_t n) { return ((n < kTokenBlock ? n : kTokenBlock) + kTile - 1) / kTile * kTile; }

    TileScratch(uint8_t* memory, size_t strips)
        : opened((uint16_t*)memory), powers((RowPowers*)(memory + kOpenedBytes)), sums((float*)(powers + strips)) {}
    static size_t bytes(size_t strips, size_t n) {
        return kOpenedBytes + strips * (sizeof(RowPowers) + padded(n) * kTile * sizeof(float));
    }
};

// A block of tokens: `x` the first of their tiles, those of the next 16 x_apart behind them; and how far apart the sums of two strips are.
struct TokenBlock {
    const uint16_t* x;
    size_t x_apart, tokens;

    TokenBlock(const Tokens& all, size_t t, size_t count) : x(all.bf16 + t * all.cols), x_apart(kTile * all.cols), tokens(count) {}
    size_t tiles() const { return (tokens + kTile - 1) / kTile; }
    size_t sums_apart() const { return tiles() * kTile * kTile; }
};

// A tile of tokens into L1.
template <class Ops>
inline void fetch_tile(const uint16_t* tile) {
#pragma GCC unroll 16
    for (size_t line = 0; line < kTile; ++line) Ops::prefetch(tile + line * kTileColumns);
}

// fn.operator()<0>() .. <n - 1>().
template <int n, class Fn>
inline void for_each_index(const Fn& fn) {
    if constexpr (n > 1) for_each_index<n - 1>(fn);
    fn.template operator()<n - 1>();
}

// --- up to 96 tokens: one strip after the other, the sums in the registers from the first to the last column ---

// A tiles of tokens times all strips. After the products with a tile of weights, the one that is kRing further is opened in its place, so that vectors and
// tiles work at the same time.
template <class Ops, class Tiles, int A, class Strips>
void sum_tall(typename Ops::TileRegisters& tiles, const TileScratch& scratch, const Strips& strips, const TokenBlock& block) {
    constexpr int kWeights = 6;
    Opener<Ops, Tiles, 1, Strips> opener(strips, scratch.powers, strips.subs());
    for (size_t n = 0; n < kRing; ++n) opener.open(scratch.opened + n * kTileHalves);
    size_t slot = 0;
    for (size_t i = 0; i < strips.count; ++i) {
        for_each_index<A>([&]<int a>() { tiles.template zero<a>(); });
        for (size_t sub = 0; sub < strips.subs(); ++sub) {
            uint16_t* weights = scratch.opened + slot * kTileHalves;
            tiles.template load<kWeights>(weights);
            for_each_index<A>([&]<int a>() {
                constexpr int kX = A < 6 && a % 2 == 0 ? 5 : 7;  // in turns, where there is a register to spare
                const uint16_t* x = block.x + a * block.x_apart + sub * kTileHalves;
                tiles.template load<kX>(x);
                if constexpr (A > 1) fetch_tile<Ops>(x + 2 * kTileHalves);
                tiles.template multiply<a, kX, kWeights>();
            });
            opener.open(weights);
            slot = (slot + 1) % kRing;
        }
        for_each_index<A>([&]<int a>() { tiles.template store<a>(scratch.sums + i * block.sums_apart() + a * kTile * kTile); });
    }
}

// --- more tokens: two strips at a time, the sums in memory between one run of columns and the next ---

// What is opened of two strips: `depth` sub-blocks from `sub` on. Meanwhile, when the last of the tokens pass, `openable` sub-blocks of the next strips are
// opened in the place of those that have been read; and of each tile of tokens, lines fetch .. fetch_end - 1 of that kPairDepth further are fetched into L2.
struct Pass {
    uint16_t* weights;
    size_t sub, depth, openable, fetch, fetch_end;
};

// Sums [A tiles of tokens][B strips] += A x B tiles. Loads are what a busy core has least time for, so each register is loaded again as soon as it was
// read for the last time, and from L1: tokens are fetched there two tiles ahead.
template <class Ops, int A, int B, class PairOpener>
void multiply_tiles(typename Ops::TileRegisters& tiles, const TokenBlock& block, const uint16_t* x, const Pass& pass, float* sums, PairOpener& opener,
                    size_t openable) {
    const auto each_sum = [&](const auto& fn) {
        for_each_index<A * B>([&]<int n>() {
            constexpr int a = n / B, b = n % B;
            fn.template operator()<2 * a + b>(sums + b * block.sums_apart() + a * kTile * kTile);
        });
    };
    each_sum([&]<int t>(const float* from) { pass.sub == 0 ? tiles.template zero<t>() : tiles.template load_sums<t>(from); });
    const uint16_t* weights = pass.weights;
    const auto load_x = [&]<int a>(const uint16_t* from) {
        if constexpr (a < A) tiles.template load<4 + a>(from + a * block.x_apart);
    };
    const auto load_weights = [&]<int b>(const uint16_t* from) {
        if constexpr (b < B) tiles.template load<6 + b>(from + b * kTileHalves);
    };
    const auto multiply = [&]<int a, int b>() {
        if constexpr (a < A && b < B) tiles.template multiply<2 * a + b, 4 + a, 6 + b>();
    };
    load_x.template operator()<0>(x);
    load_x.template operator()<1>(x);
    load_weights.template operator()<0>(weights);
    load_weights.template operator()<1>(weights);
    const auto step = [&]<bool more>(size_t k) {
        const uint16_t *next_x = x + kTileHalves, *next_weights = weights + 2 * kTileHalves;
        multiply.template operator()<0, 0>();
        fetch_tile<Ops>(next_x + kTileHalves);
        multiply.template operator()<0, 1>();
        if constexpr (more) load_x.template operator()<0>(next_x);
        multiply.template operator()<1, 0>();
        if constexpr (more) load_weights.template operator()<0>(next_weights);
        if constexpr (A > 1) fetch_tile<Ops>(next_x + kTileHalves + block.x_apart);
        multiply.template operator()<1, 1>();
        if constexpr (more) load_x.template operator()<1>(next_x);
        if constexpr (more) load_weights.template operator()<1>(next_weights);
        for (size_t line = pass.fetch; line < pass.fetch_end; ++line) {
            for (int a = 0; a < A; ++a) Ops::prefetch_far(x + kPairDepth * kTileHalves + a * block.x_apart + line * kTileColumns);
        }
        if (k < openable) opener.open(pass.weights + k * 2 * kTileHalves);
        x = next_x;
        weights = next_weights;
    };
    for (size_t k = 0; k + 1 < pass.depth; ++k) step.template operator()<true>(k);
    step.template operator()<false>(pass.depth - 1);
    each_sum([&]<int t>(float* to) { tiles.template store<t>(to); });
}

// A block of tokens times B opened strips.
template <class Ops, int B, class PairOpener>
void multiply_strips(typename Ops::TileRegisters& tiles, const TokenBlock& block, const Pass& pass, float* sums, PairOpener& opener) {
    for (size_t a = 0; a < block.tiles(); a += 2) {
        const bool two = a + 1 < block.tiles(), last = a + 2 >= block.tiles();
        const auto multiply = two ? multiply_tiles<Ops, 2, B, PairOpener> : multiply_tiles<Ops, 1, B, PairOpener>;
        multiply(tiles, block, block.x + a * block.x_apart + pass.sub * kTileHalves, pass, sums + a * kTile * kTile, opener, last ? pass.openable : 0);
    }
}

// Sums go back to memory after every 512 columns, so that all strips meet these columns of the tokens while they are in L2; each of the pairs of strips
// fetches its share of the next columns.
template <class Ops, class Tiles, class Strips>
void sum_pairs(typename Ops::TileRegisters& tiles, const TileScratch& scratch, const Strips& strips, const TokenBlock& block) {
    using PairOpener = Opener<Ops, Tiles, 2, Strips>;
    const size_t subs = strips.subs(), pairs = (strips.count + 1) / 2;
    const auto depth_at = [&](size_t sub) { return subs - sub < kPairDepth ? subs - sub : kPairDepth; };
    PairOpener opener(strips, scratch.powers, kPairDepth);
    for (size_t k = 0; k < depth_at(0); ++k) opener.open(scratch.opened + k * 2 * kTileHalves);
    for (size_t sub = 0; sub < subs; sub += kPairDepth) {
        const size_t depth = depth_at(sub), lines = sub + depth < subs ? kTile : 0;
        for (size_t pair = 0; pair < pairs; ++pair) {
            const size_t openable = pair + 1 < pairs ? depth : depth_at(sub + depth);
            const auto multiply = 2 * pair + 1 < strips.count ? multiply_strips<Ops, 2, PairOpener> : multiply_strips<Ops, 1, PairOpener>;
            const Pass pass{scratch.opened, sub, depth, openable, pair * lines / pairs, (pair + 1) * lines / pairs};
            multiply(tiles, block, pass, scratch.sums + 2 * pair * block.sums_apart(), opener);
        }
    }
}

// The product with so many tiles of tokens.
template <class Ops, class Tiles, class Strips>
auto sum_of(size_t token_tiles) {
    using Sum = void (*)(typename Ops::TileRegisters&, const TileScratch&, const Strips&, const TokenBlock&);
    static constexpr Sum kTall[kTallTiles] = {sum_tall<Ops, Tiles, 1, Strips>, sum_tall<Ops, Tiles, 2, Strips>, sum_tall<Ops, Tiles, 3, Strips>,
                                              sum_tall<Ops, Tiles, 4, Strips>, sum_tall<Ops, Tiles, 5, Strips>, sum_tall<Ops, Tiles, 6, Strips>};
    return token_tiles <= kTallTiles ? kTall[token_tiles - 1] : sum_pairs<Ops, Tiles, Strips>;
}

template <class Ops, class Tiles, class At>
void find_powers(const TileStrips<Tiles, At>& strips, RowPowers* powers) {
    for (size_t i = 0; i < strips.count; ++i) find_powers<Ops, Tiles>(strips.scales(i, 0), strips.subs(), powers[i]);
}

// Calls put(t, tokens) for each block of tokens, when its sums are there.
template <class Ops, class Tiles, class Strips, class Put>
inline void for_blocks(const Strips& strips, const Tokens& x, const TileScratch& scratch, const Put& put) {
    find_powers<Ops>(strips, scratch.powers);
    typename Ops::TileRegisters tiles;
    for (size_t t = 0; t < x.n; t += kTokenBlock) {
        const TokenBlock block(x, t, x.n - t < kTokenBlock ? x.n - t : kTokenBlock);
        sum_of<Ops, Tiles, Strips>(block.tiles())(tiles, scratch, strips, block);
        put(t, block.tokens);
    }
}

// A token's sums of a strip, without their powers, to its output.
template <class Ops>
inline void put_sums(const float* sums, const RowPowers& powers, const Outputs& out, size_t token, size_t row, size_t row_count) {
    float results[kTile], *to = row_of(out, token) + row;
    for (size_t r = 0; r < kTile; r += Ops::kLanes) {
        auto values = Ops::mul(Ops::load(sums + r), Ops::load(powers.sum + r));
        if (row_count == kTile && out.accumulate) values = Ops::add(values, Ops::load(to + r));
        Ops::store(row_count == kTile ? to + r : results + r, values);
    }
    if (row_count < kTile) put(out, token, row, results, row_count);
}

// outputs (+)= x @ rows^T, of `row_count` rows in these strips; reads x.bf16, whose last tiles may have rows of whatever value.
template <class Ops, class Tiles, class Strips>
void gemm_opened(const Strips& strips, size_t row_count, const Tokens& x, const Outputs& out, uint8_t* memory) {
    const TileScratch scratch(memory, strips.count);
    for_blocks<Ops, Tiles>(strips, x, scratch, [&](size_t t, size_t tokens) {
        const size_t apart = TileScratch::padded(tokens) * kTile;
        for (size_t i = 0; i < tokens; ++i) {
            // Outputs lie all over memory: those of the token after the next are fetched while these are added to.
            const float* far = row_of(out, t + (i + 2 < tokens ? i + 2 : i));
            for (size_t row = 0; row < row_count; row += kTile) {
                Ops::prefetch(far + row);
                const float* sums = scratch.sums + row / kTile * apart + i * kTile;
                put_sums<Ops>(sums, scratch.powers[row / kTile], out, t + i, row, row_count - row < kTile ? row_count - row : kTile);
            }
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

// out [n, row_count] = silu(x @ gate^T) * (x @ up^T): strips of both, side by side, are what is opened at once.
template <class Ops, class Tiles, class Strips>
void gate_opened(const Strips& strips, size_t row_count, const Tokens& x, float* out, uint8_t* memory) {
    const TileScratch scratch(memory, strips.count);
    for_blocks<Ops, Tiles>(strips, x, scratch, [&](size_t t, size_t tokens) {
        const size_t apart = TileScratch::padded(tokens) * kTile;
        for (size_t i = 0; i < strips.count; i += 2) {
            const size_t row = i / 2 * kTile, count = row_count - row < kTile ? row_count - row : kTile;
            const float* sums = scratch.sums + i * apart;
            put_gated<Ops>(sums, sums + apart, scratch.powers + i, out + t * row_count + row, row_count, tokens, count);
        }
    });
}

inline size_t strips_of(const Rows& rows) { return (rows.count + kTile - 1) / kTile; }

// In tile order: Rows::data is a strip, and row_bytes a strip's.
template <class Ops, class Tiles>
void gemm_tiles(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* memory) {
    const auto at = [&](size_t i) { return rows.data + i * rows.row_bytes; };
    gemm_opened<Ops, Tiles>(TileStrips<Tiles, decltype(at)>{at, strips_of(rows), x.cols}, rows.count, x, out, memory);
}

template <class Ops, class Tiles>
void gate_tiles(const Rows& gate, const Rows& up, const Tokens& x, float* out, uint8_t* memory) {
    const auto at = [&](size_t i) { return (i % 2 == 0 ? gate : up).data + i / 2 * gate.row_bytes; };
    gate_opened<Ops, Tiles>(TileStrips<Tiles, decltype(at)>{at, 2 * strips_of(gate), x.cols}, gate.count, x, out, memory);
}

// In row order, of any type.
inline Rows strip_of(const Rows& rows, size_t i) {
    const size_t first = i * kTile;
    return {rows.data + first * rows.row_bytes, rows.row_bytes, rows.count - first < kTile ? rows.count - first : kTile};
}

template <class Ops>
void gemm_any_rows(const RowFormat& format, const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* memory) {
    const auto at = [&](size_t i) { return strip_of(rows, i); };
    gemm_opened<Ops, InRows<Ops>>(RowStrips<decltype(at)>{at, format, strips_of(rows), x.cols}, rows.count, x, out, memory);
}

template <class Ops>
void gate_any_rows(const RowFormat& format, const Rows& gate, const Rows& up, const Tokens& x, float* out, uint8_t* memory) {
    const auto at = [&](size_t i) { return strip_of(i % 2 == 0 ? gate : up, i / 2); };
    gate_opened<Ops, InRows<Ops>>(RowStrips<decltype(at)>{at, format, 2 * strips_of(gate), x.cols}, gate.count, x, out, memory);
}

template <class Ops, class Format>
void gemm_rows(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* memory) {
    gemm_any_rows<Ops>(row_format<Ops, Format>(), rows, x, out, memory);
}

template <class Ops, class Format>
void gate_rows(const Rows& gate, const Rows& up, const Tokens& x, float* out, uint8_t* memory) {
    gate_any_rows<Ops>(row_format<Ops, Format>(), gate, up, x, out, memory);
}

template <class Ops>
size_t tile_scratch_bytes(size_t rows, size_t n) {
    return TileScratch::bytes((rows + kTile - 1) / kTile, n);
}

template <class Ops, class Tiles>
constexpr Bf16Product tile_product() {
    return {Tiles::kType, true, gemm_tiles<Ops, Tiles>, gate_tiles<Ops, Tiles>};
}

template <class Ops, class Format>
constexpr Bf16Product row_product() {
    return {Format::kType, false, gemm_rows<Ops, Format>, gate_rows<Ops, Format>};
}

template <class Ops>
constexpr Bf16Product kBf16Products[] = {
    tile_product<Ops, Q4_0Tiles<Ops>>(),   tile_product<Ops, Q4_1Tiles<Ops>>(),   tile_product<Ops, Q5_0Tiles<Ops>>(), tile_product<Ops, Q5_1Tiles<Ops>>(),
    tile_product<Ops, Q8_0Tiles<Ops>>(),   tile_product<Ops, Q4_KTiles<Ops>>(),   tile_product<Ops, Q5_KTiles<Ops>>(), tile_product<Ops, Q6_KTiles<Ops>>(),
    tile_product<Ops, Q2_KTiles<Ops>>(),   tile_product<Ops, Q3_KTiles<Ops>>(),   tile_product<Ops, IQ4_NLTiles<Ops>>(), tile_product<Ops, IQ4_XSTiles<Ops>>(),
    tile_product<Ops, MXFP4Tiles<Ops>>(),
    row_product<Ops, F16<Ops>>(), row_product<Ops, BF16<Ops>>(),
    row_product<Ops, IQ1_S<Ops>>(), row_product<Ops, IQ1_M<Ops>>(), row_product<Ops, IQ2_XXS<Ops>>(), row_product<Ops, IQ2_XS<Ops>>(),
    row_product<Ops, IQ2_S<Ops>>(), row_product<Ops, IQ3_XXS<Ops>>(), row_product<Ops, IQ3_S<Ops>>(),
};

template <class Ops>
constexpr Bf16Kernels make_bf16_kernels() {
    return {kBf16Products<Ops>, sizeof(kBf16Products<Ops>) / sizeof(Bf16Product), kTilesFrom, tile_scratch_bytes<Ops>, put_bf16<Ops>};
}

}  // namespace
}  // namespace moespan
