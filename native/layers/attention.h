// The paged KV cache and causal attention over it, on the pool.
#pragma once

#include <cstddef>

#include "isa/kernels.h"
#include "pool/pool.h"

namespace moespan {

// Writes k, v [n, kv_heads, head_dim] of positions start .. start + n - 1 into the cache's pages.
void store_kv(Pool& pool, const PagedKv& kv, const float* k, const float* v, size_t n, size_t start);

// Each query attends to the keys up to its own position; call.kv must hold start + n tokens. Work is cut by KV head and by tiles of query
// rows, and, where that leaves threads idle (decode over a long context), by runs of keys too.
void attention(Pool& pool, const Attention& call);

// What attention left where it cut the keys: each row's results, one for each run of keys.
struct Splits {
    const float* partials;  // [count][rows][value_dim + 2], in memory of the pool
    size_t count, rows, value_dim;

    // Row `row` of the output. Nothing where there is one run of keys alone: then the row is there already.
    void join(const KernelTable& kernels, size_t row, float* out) const;
};

// The same over a cache of latents, which all heads share (PagedKv says how they lie). Rows are still to be joined by whoever reads them.
Splits latent_attention(Pool& pool, const Attention& call);

// What rope does to one layer's queries and keys.
struct Rotation {
    const float* table;  // [n, rot_dim / 2, 2]
    size_t rot_dim;
    bool interleaved;
};

// The whole of a layer's attention behind its projections: rotates q and k in place, stores k and v, attends. call.q is q.
void attend(Pool& pool, const Attention& call, float* q, float* k, const float* v, const Rotation& rotation);

}  // namespace moespan
