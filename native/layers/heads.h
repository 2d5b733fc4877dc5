// A weight matrix of its own for each attention head, on the pool.
#pragma once

#include <algorithm>
#include <cstddef>

#include "layers/linear.h"
#include "layers/product.h"
#include "pool/pool.h"

namespace moespan {

// [n, heads, at least cols] floats inside a larger array: the distances between tokens and between heads.
template <class T>
struct HeadRows {
    T* data;
    size_t token_stride, head_stride;

    T* row(size_t token, size_t head) const { return data + token * token_stride + head * head_stride; }
};

// How the heads' rows are cut: the same pieces for each head, one head's behind the other's.
class HeadPieces {
  public:
    HeadPieces(Pool& pool, const Matrix& matrix, size_t n);

    size_t count() const { return product_.matrix().count * chunks_.count(); }
    bool whole_heads() const { return chunks_.count() == 1; }
    size_t head(size_t piece) const { return piece / chunks_.count(); }
    size_t scratch_bytes() const { return product_.scratch_bytes(n_, chunks_.chunk_rows); }
    Readers readers() const { return product_.reads(n_); }

    // x: the head's tokens.
    void compute(size_t piece, const Tokens& x, const HeadRows<float>& out, const Seat& seat) const;

  private:
    const Product product_;
    const size_t n_;
    Chunks chunks_;
};

constexpr size_t kHeadRowsAtOnce = 16;  // of the input that a thread rounds, or copies

// out[t, h, : rows] = matrix h @ row(t, h)[: cols] for each head h of the matrix.count heads. `row` is called once for each token and head, on any thread,
// and may make there what it returns. Rows and out do not overlap.
template <class Row>
void linear_heads(Pool& pool, const Matrix& matrix, size_t n, const Row& row, const HeadRows<float>& out) {
    const size_t heads = matrix.count;
    const HeadPieces pieces(pool, matrix, n);
    pool.count_read(Weights::kDense, heads * matrix.bytes());
    const Activations input(pool, Shared::kInput, heads * n, heads, matrix.cols, pieces.readers());  // of a head, all tokens one behind the other
    const auto run = [n](size_t head) { return Run{head * n, n, head}; };
    pool.reserve_scratch(pieces.scratch_bytes());

    const auto fill = [&](size_t token, size_t head) { input.put(run(head), token, 0, row(token, head), matrix.cols, pieces.readers()); };
    if (!pieces.whole_heads()) {
        pool.each(ceil_div(n * heads, kHeadRowsAtOnce), [&](size_t i, uint8_t*) {
            for (size_t r = i * kHeadRowsAtOnce; r < std::min(n * heads, (i + 1) * kHeadRowsAtOnce); ++r) fill(r / heads, r % heads);
        });
    }
    pool.each_seated(pieces.count(), [&](size_t i, const Seat& seat) {
        const size_t head = pieces.head(i);
        for (size_t token = 0; token < n && pieces.whole_heads(); ++token) fill(token, head);
        pieces.compute(i, input.rows(run(head)), out, seat);
    });
}

}  // namespace moespan
