// The table of kernels that each instruction set fills (kernels_*.cpp; registry.cpp lists them), and the plain structs that cross it.
//
// Only stdint and stddef, and no inline function: this header is compiled with AVX-512 flags too, and a weak inline symbol from there
// could be the one that the linker keeps for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moespan {

// Activations x [n, cols] as the kernels read them. Formats that are quantised read codes, scales and sums; float formats read values.
struct Tokens {
    size_t n, cols;
    const float* values;     // [n][cols]
    const int8_t* codes;     // [n][cols], -127..127; x is about scale * code
    const float* scales;     // [n][cols / 32]
    const float* sums;       // [n][cols / 32]: scale * (sum of the 32 codes)
    const float* half_sums;  // [n][cols / 16]: the same over each 16
    const uint16_t* bf16;    // [n / 16][cols / 32][16][32]: bfloat16 of 2^64 x, each four columns in the order 0 2 1 3 (kernels/amx-inl.h)
};

// A run of consecutive rows of a weight matrix in GGUF blocks.
struct Rows {
    const uint8_t* data;
    size_t row_bytes;
    size_t count;
    const uint8_t* next = nullptr;  // what this thread reads after them, to be fetched meanwhile; null when that is not known
};

// Where a product goes: element (token, row) is data[token * stride + row], or data[tokens[token] * stride + row].
struct Outputs {
    float* data;
    size_t stride;
    bool accumulate;
    const int32_t* tokens = nullptr;
};

// Which columns of a matrix a strip holds, in this order: whole blocks, and behind them a part of one more block. All are multiples of 32, and with a
// part, count is one of 256.
struct Columns {
    size_t first, count;
    size_t part, part_count;
};

// The same products from tile order (kernels/tiles-inl.h), in strips of kStripRows rows. All null for a type that stays in row order.
constexpr size_t kStripRows = 16;
struct TileKernels {
    size_t gemm_from;
    size_t (*strip_bytes)(size_t cols);
    // These columns of up to kStripRows rows in blocks to a strip.
    void (*pack)(const uint8_t* rows, size_t row_bytes, size_t row_count, const Columns& columns, uint8_t* strip);
    // As below; rows.data is the strip of the first row, row_bytes a strip's.
    void (*gemv)(const Rows& rows, const Tokens& x, const Outputs& out);
    void (*gemm)(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* scratch);
};

// Products for many tokens whose operands are rounded to bfloat16 on the fly (kernels/amx-inl.h), by type and order.
struct Bf16Product {
    uint32_t type_id;
    bool from_tiles;  // from tile order; else from row order, where columns must be a multiple of 32
    // As TileKernels::gemm or FormatKernels::gemm; reads Tokens::bf16.
    void (*gemm)(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* scratch);
    // out [n, gate.count] = silu(x @ gate^T) * (x @ up^T), both of this type and as many rows; scratch as for twice as many.
    void (*gate)(const Rows& gate, const Rows& up, const Tokens& x, float* out, uint8_t* scratch);
};
struct Bf16Kernels {
    const Bf16Product* products;
    size_t count;
    size_t from;  // tokens from which they are the faster
    size_t (*scratch_bytes)(size_t rows, size_t n);
    // `cols` columns (a multiple of 32) of one token to its line of as many tiles of Tokens::bf16.
    void (*put)(const float* x, size_t cols, uint16_t* to);
};

// The kernels of one GGUF type.
struct FormatKernels {
    uint32_t type_id;
    size_t block_values, block_bytes;
    bool float_input;  // reads Tokens::values instead of the int8 codes
    size_t gemm_from;  // tokens from which gemm is the faster (measured on Zen 3)

    // outputs (+)= x @ rows^T, straight from the blocks: for few tokens.
    void (*gemv)(const Rows& rows, const Tokens& x, const Outputs& out);
    // The same through unpacked panels of KernelTable::panel_rows rows: for many tokens. scratch, 64-byte aligned, holds all of them.
    void (*gemm)(const Rows& rows, const Tokens& x, const Outputs& out, uint8_t* scratch);
    size_t (*panel_bytes)(size_t cols);
    // out[cols] = one row.
    void (*dequantize)(const uint8_t* row, size_t cols, float* out);

    TileKernels tiles;
};

// One layer's KV cache and the pages of one sequence in it; float16 (as uint16_t) when half, else float32.
//
// Latent attention has one array, v is null: k [num_pages, page_size, head_dim], one head whose values are its keys' first value_dim.
struct PagedKv {
    void* k;  // [num_pages, kv_heads, head_dim, page_size]
    void* v;  // [num_pages, kv_heads, page_size, head_dim]
    bool half;
    size_t kv_heads, head_dim, value_dim, page_size;  // page_size is a multiple of 16
    const int32_t* pages;                             // page of positions i * page_size ..
};

// Queries at positions start .. start + n - 1, of a sequence whose keys and values up to there are in the cache.
struct Attention {
    const float* q;  // [n, heads, head_dim]
    float* out;      // [n, heads, value_dim]
    size_t n, heads, start;
    float scale;
    PagedKv kv;
};

// What one thread works on at once: rows (token * group + head of the group, at most kAttentionRows) of one KV head against a run of keys.
constexpr size_t kAttentionRows = 96, kLatentRows = 48;
struct AttentionPiece {
    size_t kv_head, row_begin, row_end;
    size_t key_begin, key_end;  // key_begin is a multiple of 16
    float* partials;            // [n, heads, 2 + value_dim]: (maximum, sum, o) of each row; null when the piece has all the keys
};

// A loop on registers alone, of which one round is `operations` (a multiplication and an addition are two). What it returns depends on all
// of them; value is 1, which the compiler must not know.
struct PeakLoop {
    const char* name;  // of the numbers: "f32", "int8"
    double operations;
    float (*run)(size_t rounds, float value);
};

struct KernelTable {
    const char* name;
    size_t panel_rows;  // rows that the GEMM kernels work on at once
    const FormatKernels* formats;
    size_t format_count;
    const Bf16Kernels* bf16;  // null where there are none

    // --- linear, ffn (kernels/activation-inl.h) ---
    // One row of `cols` values (a multiple of 32) to int8: codes [cols], scales and sums [cols / 32], half_sums [cols / 16].
    void (*quantize)(const float* x, size_t cols, int8_t* codes, float* scales, float* sums, float* half_sums);
    // out[i] = silu(gate[i]) * up[i]; out may be gate.
    void (*silu_mul)(const float* gate, const float* up, float* out, size_t count);

    // --- norm, rope (kernels/norm-inl.h, kernels/rope-inl.h) ---
    // x, out [rows, dim], weight [dim]; out may be x.
    void (*rms_norm)(const float* x, const float* weight, float* out, size_t rows, size_t dim, float eps);
    // x [n, heads, head_dim] in place; table [n, rot_dim / 2, 2] holds (cos, sin).
    void (*rope)(float* x, size_t n, size_t heads, size_t head_dim, size_t rot_dim, const float* table, bool interleaved);

    // --- attention (kernels/kv-inl.h, kernels/attention-inl.h) ---
    // One head's positions begin .. end - 1 into the cache; row 0 of k, v [n, kv_heads, head_dim] is position `first`.
    void (*store_kv)(const PagedKv& kv, const float* k, const float* v, size_t head, size_t first, size_t begin, size_t end);
    size_t (*attention_scratch_bytes)(size_t head_dim);
    void (*attend)(const Attention& call, const AttentionPiece& piece, uint8_t* scratch);
    // out [value_dim] = the splits of one row joined; split i lies at partials + i * stride, as AttentionPiece::partials says.
    void (*merge_splits)(const float* partials, size_t splits, size_t stride, size_t value_dim, float* out);

    // --- latent attention (kernels/latent-inl.h) ---
    // Latents [count, head_dim] of positions begin .. begin + count - 1 into the cache.
    void (*store_latents)(const PagedKv& kv, const float* latents, size_t begin, size_t count);
    size_t (*latent_scratch_bytes)(size_t head_dim, size_t value_dim);
    // As attend; pieces have at most kLatentRows rows.
    void (*attend_latent)(const Attention& call, const AttentionPiece& piece, uint8_t* scratch);

    // --- what the machine can reach (kernels/sweep-inl.h, kernels/peak-inl.h) ---
    // The sum of data [count]; count is a multiple of 64.
    float (*read_all)(const float* data, size_t count);
    const PeakLoop* peaks;
    size_t peak_count;
};

// Constant-initialised: nothing of another instruction set runs at load time.
extern const KernelTable kScalarKernels, kAvx2Kernels, kAvx512Kernels, kAvx512VnniKernels;
extern const Bf16Kernels kAmxKernels, kAvx512Bf16Kernels, kAmxEmulatedKernels;
extern const PeakLoop kAmxPeakLoops[2], kAvx512Bf16PeakLoop;

}  // namespace moespan
