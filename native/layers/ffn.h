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
    size_t chunk_rows, first_piece;  // how its gate and up are cut: ffn.cpp's own
};

// Feed-forward networks of several experts in one go.
struct ExpertCall {
    const Matrix &gate, &up, &down;  // their experts one behind the other
    const float* x;                  // [n, gate.cols]
    float* out;                      // [n, down.rows]
    bool accumulate;
    Group* groups;
    size_t group_count;
    size_t rows;            // of all groups together
    const int32_t* tokens;  // [rows] the token of each row; null: the rows of each group are the tokens 0, 1, ..
    const float* factors;   // [rows] of each row's result; null: 1
};

// out [token] (+)= the sum over the token's rows, in the order of the groups, so that no timing of threads changes the result.
void ffn_groups(Pool& pool, const ExpertCall& call);

}  // namespace moespan
