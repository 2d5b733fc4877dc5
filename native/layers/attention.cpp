#include "layers/attention.h"

#include <algorithm>

#include "layers/rope.h"
#include "layers/spread.h"

namespace moespan {
namespace {

constexpr size_t kSmallStore = 16384;    // values that one thread stores in about as long as a fork and a join take
constexpr size_t kSmallAttend = 200000;  // the same in floating-point operations
constexpr size_t kMinRows = 24;          // smaller tiles read keys and values too often
constexpr size_t kKeyStep = 16;          // what a piece's first key is a multiple of
constexpr size_t kMinKeys = 128, kMinLatents = 32;  // smaller splits spend their time on merging; a latent is read by all heads
constexpr size_t kPieces = 4, kLatentPieces = 2;    // a thread, so that the last ones leave none idle for long; each of latents packs all queries again

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// The kernel of one kind of cache, and the sizes of its tiles and splits.
struct Form {
    void (*attend)(const Attention& call, const AttentionPiece& piece, uint8_t* scratch);
    size_t scratch_bytes, least_rows, most_rows;
    size_t min_keys, pieces_per_thread;
};

// How the work of one call is cut: kv_heads x row_tiles x splits pieces.
struct Plan {
    size_t rows;  // of one KV head: n * group
    size_t tile_rows, row_tiles;
    size_t keys, split_keys, splits;

    size_t pieces(size_t kv_heads) const { return kv_heads * row_tiles * splits; }
};

Plan make_plan(const Attention& call, const Form& form, size_t threads) {
    const size_t wanted = threads == 1 ? 1 : form.pieces_per_thread * threads;
    Plan plan;
    plan.rows = call.n * (call.heads / call.kv.kv_heads);
    plan.keys = call.start + call.n;
    plan.tile_rows = std::min(plan.rows, form.most_rows);
    while (call.kv.kv_heads * ceil_div(plan.rows, plan.tile_rows) < wanted && plan.tile_rows / 2 >= form.least_rows) plan.tile_rows /= 2;
    plan.row_tiles = ceil_div(plan.rows, plan.tile_rows);
    const size_t most = std::max<size_t>(1, plan.keys / form.min_keys);
    const size_t splits = std::min(most, ceil_div(wanted, call.kv.kv_heads * plan.row_tiles));
    plan.split_keys = ceil_div(ceil_div(plan.keys, splits), kKeyStep) * kKeyStep;
    plan.splits = ceil_div(plan.keys, plan.split_keys);
    return plan;
}

// Piece i. The tiles with the most keys come first, so that what is left at the end is small.
AttentionPiece piece_at(const Attention& call, const Plan& plan, size_t i, float* partials) {
    const size_t split = i % plan.splits, kv_head = i / plan.splits % call.kv.kv_heads;
    const size_t tile = plan.row_tiles - 1 - i / (plan.splits * call.kv.kv_heads);
    const size_t group = call.heads / call.kv.kv_heads;
    AttentionPiece piece;
    piece.kv_head = kv_head;
    piece.row_begin = tile * plan.tile_rows;
    piece.row_end = std::min(plan.rows, piece.row_begin + plan.tile_rows);
    const size_t seen = call.start + (piece.row_end - 1) / group + 1;  // by the tile's last row
    piece.key_begin = split * plan.split_keys;
    piece.key_end = std::min(seen, piece.key_begin + plan.split_keys);
    piece.partials = plan.splits == 1 ? nullptr : partials + split * call.n * call.heads * (call.kv.value_dim + 2);
    return piece;
}

Splits run_pieces(Pool& pool, const Attention& call, const Form& form) {
    const Plan plan = make_plan(call, form, static_cast<size_t>(pool.threads()));
    const size_t row_floats = call.kv.value_dim + 2, operations = 2 * call.n * call.heads * (call.kv.head_dim + call.kv.value_dim) * plan.keys;
    float* partials = nullptr;
    if (plan.splits > 1) partials = static_cast<float*>(pool.shared(Shared::kPartials, plan.splits * call.n * call.heads * row_floats * sizeof(float)));
    pool.reserve_scratch(form.scratch_bytes);
    spread(pool, plan.pieces(call.kv.kv_heads), operations < kSmallAttend,
           [&](size_t i, uint8_t* scratch) { form.attend(call, piece_at(call, plan, i, partials), scratch); });
    return {partials, plan.splits, call.n * call.heads, call.kv.value_dim};
}

}  // namespace

void store_kv(Pool& pool, const PagedKv& kv, const float* k, const float* v, size_t n, size_t start) {
    // One head of one page at a time: no two threads write to one page of one head.
    const size_t first_page = start / kv.page_size, pages = ceil_div(start + n, kv.page_size) - first_page;
    spread(pool, pages * kv.kv_heads, n * kv.kv_heads * kv.head_dim <= kSmallStore, [&](size_t i, uint8_t*) {
        const size_t page = first_page + i / kv.kv_heads;
        const size_t begin = std::max(start, page * kv.page_size), end = std::min(start + n, (page + 1) * kv.page_size);
        pool.kernels().store_kv(kv, k, v, i % kv.kv_heads, start, begin, end);
    });
}

void Splits::join(const KernelTable& kernels, size_t row, float* out) const {
    const size_t stride = value_dim + 2;
    if (count > 1) kernels.merge_splits(partials + row * stride, count, rows * stride, value_dim, out);
}

void attention(Pool& pool, const Attention& call) {
    const KernelTable& kernels = pool.kernels();
    const Splits splits = run_pieces(pool, call, {kernels.attend, kernels.attention_scratch_bytes(call.kv.head_dim), kMinRows, kAttentionRows, kMinKeys, kPieces});
    if (splits.count == 1) return;
    spread(pool, splits.rows, splits.rows * splits.count * splits.value_dim < kSmallStore,
           [&](size_t row, uint8_t*) { splits.join(kernels, row, call.out + row * splits.value_dim); });
}

Splits latent_attention(Pool& pool, const Attention& call) {
    const KernelTable& kernels = pool.kernels();
    const size_t scratch = kernels.latent_scratch_bytes(call.kv.head_dim, call.kv.value_dim);
    return run_pieces(pool, call, {kernels.attend_latent, scratch, kLatentRows, kLatentRows, kMinLatents, kLatentPieces});
}

void attend(Pool& pool, const Attention& call, float* q, float* k, const float* v, const Rotation& rotation) {
    const size_t n = call.n, head_dim = call.kv.head_dim;
    rope(pool, q, n, call.heads, head_dim, rotation.rot_dim, rotation.table, rotation.interleaved);
    rope(pool, k, n, call.kv.kv_heads, head_dim, rotation.rot_dim, rotation.table, rotation.interleaved);
    store_kv(pool, call.kv, k, v, n, call.start);
    attention(pool, call);
}

}  // namespace moespan
