// Gated feed-forward networks (SwiGLU; Shazeer 2020): of one dense layer, or of the experts of a layer that each have tokens of their own.
#pragma once

#include "layers/linear.h"

namespace moespan {

// out [n, hidden] (+)= scales * ((silu(x @ gate^T) * (x @ up^T)) @ down^T), x [n, gate.cols]; scales [n] is one factor a token, null for 1. gate
// and up have one shape, and down.cols == gate.rows. out must not overlap x (linear and ffn may be handed normed(x), which is elsewhere).
void ffn(Pool& pool, const Matrix& gate, const Matrix& up, const Matrix& down, const float* x, size_t n, const float* scales, float* out, bool accumulate);

// The rows first .. first + count - 1 of a call, which are one expert's.
struct Group {
    size_t expert, first, count;
};

// The matrices of one expert, or of several, one behind the other.
struct Gated {
    Matrix gate, up, down;
};

// Where the experts of a layer lie: in one place, or with a part for each of the pool's nodes (layers/parts.h).
struct Spread {
    const Gated* parts;
    size_t count = 1;
    bool copies = false;  // each part has all of them, and not a slice of each
};

// Feed-forward networks of several experts in one go.
struct ExpertCall {
    Spread experts;
    const float* x;  // [n, hidden]
    size_t n;
    float* out;  // [n, hidden]
    bool accumulate;
    const Group* groups;
    size_t group_count;
    size_t rows;            // of all groups together
    const int32_t* tokens;  // [rows] the token of each row; null: the rows of each group are the tokens 0, 1, ..
    const float* factors;   // [rows] of each row's result; null: 1
};

// out [token] (+)= the sum over the token's rows, in the order of the groups and then of the slices, so that no timing of threads changes the result.
void ffn_groups(Pool& pool, const ExpertCall& call);

}  // namespace moespan
