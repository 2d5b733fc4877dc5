// The routed experts of a mixture-of-experts layer.
#pragma once

#include "layers/ffn.h"

namespace moespan {

// Which experts each token was given: ids [n, top_k], below the matrices' count or -1 for none, and their weights.
struct Routes {
    const int32_t* ids;
    const float* weights;
    size_t n, top_k;
};

// out [n, hidden] (+)= sum over j of weights[t, j] * ffn of expert ids[t, j] (x), x [n, hidden]; shapes as in ffn. out must not overlap x.
void experts(Pool& pool, const Spread& matrices, const float* x, const Routes& routes, float* out, bool accumulate);

}  // namespace moespan
