// A layer's multi-head latent attention behind its projections, on the pool.
#pragma once

#include <cstddef>

#include "isa/kernels.h"
#include "layers/attention.h"
#include "layers/linear.h"
#include "layers/norm.h"
#include "pool/pool.h"

namespace moespan {

// One call: queries q [n, heads, nope + rope] and latents [n, kv_lora + rope], which are overwritten, of positions start .. start + n - 1.
struct LatentCall {
    const float* q;
    float* latents;
    float* out;  // [n, heads, v_dim]
    size_t n, start;
    float scale;
    Rotation rotation;  // of the last rot_dim values of each query and latent
    InputNorm norm;     // of each latent's first kv_lora values
    Matrix k_b, v_b;    // `heads` matrices each, [kv_lora, nope] and [v_dim, kv_lora]
    PagedKv kv;
};

// Norms, rotates and stores the latents; then, over all start + n of them, with c a latent's first kv_lora values and k_rope its last,
//   score = scale * ((k_b[h] q_nope) . c + q_rope . k_rope),   out[h] = v_b[h] (softmax(score) c).
void attend_latent(Pool& pool, const LatentCall& call);

}  // namespace moespan
