#include "layers/latent.h"

#include <algorithm>
#include <cstring>

#include "layers/heads.h"
#include "layers/spread.h"

namespace moespan {
namespace {

constexpr size_t kSmall = 32768;                  // values that one thread norms or rotates in about as long as a fork and a join take
constexpr size_t kBlockBytes = 48 * 1024 * 1024;  // of absorbed queries and their results: with many heads they are far wider than q

void store_latents(Pool& pool, const LatentCall& call) {
    const size_t kv_lora = call.k_b.rows, dim = call.kv.head_dim, rot_dim = call.rotation.rot_dim;
    const KernelTable& kernels = pool.kernels();
    spread(pool, call.n, call.n * dim <= kSmall, [&](size_t token, uint8_t*) {
        float* latent = call.latents + token * dim;
        kernels.rms_norm(latent, call.norm.weight, latent, 1, kv_lora, call.norm.eps);
        kernels.rope(latent + kv_lora, 1, 1, dim, rot_dim, call.rotation.table + token * rot_dim, call.rotation.interleaved);
        kernels.store_latents(call.kv, latent, call.start + token, 1);
    });
}

// Where the queries of one block of tokens are, on their way from q to latents.
struct Queries {
    const LatentCall& call;
    const KernelTable& kernels;
    size_t first;                 // token
    HeadRows<const float> given;  // [n, heads, nope + rope]
    HeadRows<float> made;         // [n, heads, kv_lora + rope]

    // What k_b absorbs: the query's first values. Its last ones are rotated and put behind the absorbed part.
    const float* row(size_t token, size_t head) const {
        const size_t nope = call.k_b.cols, rot_dim = call.rotation.rot_dim;
        const float* from = given.row(token, head);
        float* to = made.row(token, head) + call.k_b.rows;
        std::memcpy(to, from + nope, rot_dim * sizeof(float));
        kernels.rope(to, 1, 1, rot_dim, rot_dim, call.rotation.table + (first + token) * rot_dim, call.rotation.interleaved);
        return from;
    }
};

// Tokens first .. first + n - 1 of the call.
void attend_block(Pool& pool, const LatentCall& call, size_t first, size_t n) {
    const size_t heads = call.k_b.count, width = call.k_b.cols + call.rotation.rot_dim, dim = call.kv.head_dim;
    const size_t kv_lora = call.v_b.cols, v_dim = call.v_b.rows;
    auto* queries = static_cast<float*>(pool.shared(Shared::kAbsorbed, n * heads * dim * sizeof(float)));
    auto* mixed = static_cast<float*>(pool.shared(Shared::kMixed, n * heads * kv_lora * sizeof(float)));
    const Queries rows{call, pool.kernels(), first, {call.q + first * heads * width, heads * width, width}, {queries, heads * dim, dim}};
    linear_heads(pool, call.k_b, n, [&](size_t token, size_t head) { return rows.row(token, head); }, rows.made);
    const Splits splits = latent_attention(pool, Attention{queries, mixed, n, heads, call.start + first, call.scale, call.kv});
    const auto joined = [&](size_t token, size_t head) {
        float* row = mixed + (token * heads + head) * kv_lora;
        splits.join(pool.kernels(), token * heads + head, row);
        return row;
    };
    linear_heads(pool, call.v_b, n, joined, {call.out + first * heads * v_dim, heads * v_dim, v_dim});
}

}  // namespace

void attend_latent(Pool& pool, const LatentCall& call) {
    const size_t token_bytes = call.k_b.count * (call.kv.head_dim + call.v_b.cols) * sizeof(float);
    const size_t block = std::max<size_t>(1, kBlockBytes / token_bytes);
    store_latents(pool, call);
    for (size_t first = 0; first < call.n; first += block) attend_block(pool, call, first, std::min(block, call.n - first));
}

}  // namespace moespan
