#include "layers/experts.h"

#include <algorithm>

#include "layers/product.h"

namespace moespan {
namespace {

// The rows (token, j) of a call that have an expert, sorted by it and, within one, by token; in memory that the pool keeps.
struct Sorted {
    Group* groups;  // of the experts that have tokens
    size_t group_count;
    int32_t* tokens;   // [rows]
    float* weights;    // [rows]
    size_t rows = 0;
};

// Counting sort.
Sorted sort_by_expert(Pool& pool, const Routes& routes, size_t expert_count) {
    const size_t rows = routes.n * routes.top_k, most = std::min(rows, expert_count);
    void* memory = pool.shared(Shared::kGroups, expert_count * sizeof(size_t) + most * sizeof(Group) + rows * (sizeof(int32_t) + sizeof(float)) + 4 * 64);
    size_t at = 0;
    auto* next = take<size_t>(at, memory, expert_count);  // an expert's number of rows, then the place of its next one
    Sorted sorted{take<Group>(at, memory, most), 0, take<int32_t>(at, memory, rows), take<float>(at, memory, rows)};
    std::fill_n(next, expert_count, 0);
    for (size_t i = 0; i < rows; ++i) {
        if (routes.ids[i] >= 0) ++next[routes.ids[i]];
    }
    for (size_t expert = 0, first = 0; expert < expert_count; ++expert) {
        const size_t count = next[expert];
        if (count > 0) sorted.groups[sorted.group_count++] = {expert, first, count};
        next[expert] = first;
        first += count;
        sorted.rows = first;
    }
    for (size_t i = 0; i < rows; ++i) {
        if (routes.ids[i] < 0) continue;
        const size_t row = next[routes.ids[i]]++;
        sorted.tokens[row] = static_cast<int32_t>(i / routes.top_k);
        sorted.weights[row] = routes.weights[i];
    }
    return sorted;
}

// Bytes of one expert; slices of it make up one together.
size_t expert_bytes(const Spread& matrices) {
    size_t bytes = 0;
    for (size_t i = 0; i < (matrices.copies ? 1 : matrices.count); ++i) {
        const Gated& part = matrices.parts[i];
        bytes += part.gate.bytes() + part.up.bytes() + part.down.bytes();
    }
    return bytes;
}

}  // namespace

void experts(Pool& pool, const Spread& matrices, const float* x, const Routes& routes, float* out, bool accumulate) {
    const Sorted sorted = sort_by_expert(pool, routes, matrices.parts[0].gate.count);
    if (sorted.group_count == 0) {
        if (!accumulate) std::fill_n(out, routes.n * matrices.parts[0].down.rows, 0.0f);
        return;
    }
    pool.count_read(Weights::kExperts, sorted.group_count * expert_bytes(matrices));
    // One token: each expert reads it where it is. (With an expert named twice that would be two rows of one group.)
    const bool in_place = routes.n == 1 && sorted.group_count == routes.top_k;
    const int32_t* tokens = in_place ? nullptr : sorted.tokens;
    ffn_groups(pool, {matrices, x, routes.n, out, accumulate, sorted.groups, sorted.group_count, sorted.rows, tokens, sorted.weights});
}

}  // namespace moespan
