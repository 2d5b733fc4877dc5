// The router of a mixture-of-experts layer: which experts a token goes to, and with what weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layers/linear.h"

namespace moespan {

constexpr size_t kMaxExpertGroups = 64;

// DeepSeek-V3's rule (arXiv:2412.19437, 2.1.2), of which the others are special cases; see Routing in server/engine/ops.py.
struct Routing {
    size_t top_k;
    bool sigmoid;    // scores = sigmoid(logits), each for itself; otherwise their softmax
    bool normalize;  // the weights sum to `scale`
    float scale;
    size_t groups, groups_used;  // experts stand in `groups` equal runs, of which the best `groups_used` take part
    size_t group_top;            // a group is worth the sum of its so many best biased scores
    const float* bias;           // [experts], added for the choice only; null: 0
};

// ids, weights [n, top_k], best first, ties to the lower id; x [n, router.cols]. Ids are distinct and valid whatever the logits are (NaN is chosen
// last), given top_k <= groups_used * (experts / groups).
void route(Pool& pool, const Matrix& router, const Routing& routing, const float* x, size_t n, int32_t* ids, float* weights);

// Each of the values becomes 1 / (1 + exp(-value)), on the calling thread.
void sigmoid(float* values, size_t count);

}  // namespace moespan
