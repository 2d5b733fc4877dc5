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

// Rotates the last values of each query and puts them behind the absorbed part: queries [n, heads, kv_lora + rope].
void rotate_queries(Pool& pool, const LatentCall& call, size_t first, size_t n, float* queries) {
    const size_t heads = call.k_b.count, nope = call.k_b.cols, rot_dim = call.rotation.rot_dim, width = nope + rot_dim;
    spread(pool, n, n * heads * width <= kSmall, [&](size_t i, uint8_t*) {
        float* q = call.q + (first + i) * heads * width + nope;
        pool.kernels().rope(q, 1, heads, width, rot_dim, call.rotation.table + (first + i) * rot_dim, call.rotation.interleaved);
        float* to = queries + i * heads * call.kv.head_dim + call.k_b.rows;
        for (size_t head = 0; head < heads; ++head) std::memcpy(to + head * call.kv.head_dim, q + head * width, rot_dim * sizeof(float));
    });
}

// Tokens first .. first + n - 1 of the call.
void attend_block(Pool& pool, const LatentCall& call, size_t first, size_t n) {
    const size_t heads = call.k_b.count, nope = call.k_b.cols, width = nope + call.rotation.rot_dim, dim = call.kv.head_dim;
    const size_t kv_lora = call.v_b.cols, v_dim = call.v_b.rows;
    auto* queries = static_cast<float*>(pool.shared(Shared::kAbsorbed, n * heads * dim * sizeof(float)));
    auto* mixed = static_cast<float*>(pool.shared(Shared::kMixed, n * heads * kv_lora * sizeof(float)));
    rotate_queries(pool, call, first, n, queries);
    linear_heads(pool, call.k_b, {call.q + first * heads * width, heads * width, width}, n, {queries, heads * dim, dim});
    latent_attention(pool, Attention{queries, mixed, n, heads, call.start + first, call.scale, call.kv});
    linear_heads(pool, call.v_b, {mixed, heads * kv_lora, kv_lora}, n, {call.out + first * heads * v_dim, heads * v_dim, v_dim});
}

}  // namespace

void attend_latent(Pool& pool, const LatentCall& call) {
    const size_t token_bytes = call.k_b.count * (call.kv.head_dim + call.v_b.cols) * sizeof(float);
    const size_t block = std::max<size_t>(1, kBlockBytes / token_bytes);
    store_latents(pool, call);
    for (size_t first = 0; first < call.n; first += block) attend_block(pool, call, first, std::min(block, call.n - first));
}

}  // namespace moespan
