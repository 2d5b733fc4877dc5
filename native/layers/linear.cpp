#include "layers/linear.h"

#include <algorithm>
#include <array>
#include <optional>

#include "layers/product.h"

namespace moespan {

namespace {

// One call: the matrices' rows in pieces, one matrix's behind the other's.
class Pieces {
  public:
    Pieces(Pool& pool, const Matrix* matrices, size_t count, size_t n) {
        const auto threads = static_cast<size_t>(pool.threads());
        for (size_t i = 0; i < count; ++i) {
            const Product& product = products_[i].emplace(pool.kernels(), matrices[i]);
            cuts_[i] = product.cut(n, threads);
            count_ += cuts_[i].count();
            scratch_ = std::max(scratch_, product.scratch_bytes(n, cuts_[i].chunk_rows));
            readers_ = readers_ | product.reads(n);
        }
    }

    size_t count() const { return count_; }
    size_t scratch_bytes() const { return scratch_; }
    Readers readers() const { return readers_; }

    void compute(size_t piece, const Tokens& x, float* const* outs, bool accumulate, const Seat& seat) const {
        const uint8_t* next = piece_address(seat.next);
        const size_t i = matrix_of(piece), first = cuts_[i].begin(piece);
        products_[i]->compute(0, first, cuts_[i].end(piece), x, {outs[i] + first, products_[i]->matrix().rows, accumulate}, seat.scratch, next);
    }

  private:
    // Turns a piece of all into a piece of one matrix.
    size_t matrix_of(size_t& piece) const {
        size_t from = 0;
        for (; piece >= cuts_[from].count(); ++from) piece -= cuts_[from].count();
        return from;
    }
    const uint8_t* piece_address(size_t piece) const {
        for (size_t i = 0; i < kMaxMatrices && products_[i].has_value(); piece -= cuts_[i++].count()) {
            if (piece < cuts_[i].count()) return products_[i]->address(0, cuts_[i].begin(piece));
        }
        return nullptr;
    }

    std::array<std::optional<Product>, kMaxMatrices> products_;
    std::array<Chunks, kMaxMatrices> cuts_{};
    size_t count_ = 0, scratch_ = 0;
    Readers readers_{};
};

}  // namespace

void linear(Pool& pool, const Matrix* matrices, size_t count, const float* x, size_t n, float* const* outs, bool accumulate) {
    const size_t cols = matrices[0].cols;
    const Pieces pieces(pool, matrices, count, n);
    for (size_t i = 0; i < count; ++i) pool.count_read(Weights::kDense, matrices[i].bytes());
    const Run tokens{0, n, 0};
    const Activations input(pool, Shared::kInput, n, 1, cols, pieces.readers(), x);
    pool.reserve_scratch(pieces.scratch_bytes());
    if (input.to_fill()) pool.each(n, [&](size_t t, uint8_t*) { input.put(tokens, t, 0, x + t * cols, cols, pieces.readers()); });
    pool.each_seated(pieces.count(), [&](size_t i, const Seat& seat) { pieces.compute(i, input.rows(tokens), outs, accumulate, seat); });
}

void repeat_row(const float* row, size_t cols, float* out, size_t n) {
    for (size_t i = 0; i < n; ++i) std::copy_n(row, cols, out + i * cols);
}

void dequantize_rows(Pool& pool, const Matrix& matrix, const int64_t* row_ids, size_t n, float* out) {
    const FormatKernels& format = format_of(pool.kernels(), matrix);
    pool.each(n, [&](size_t i, uint8_t*) { format.dequantize(matrix.data + row_ids[i] * matrix.row_bytes, matrix.cols, out + i * matrix.cols); });
}

}  // namespace moespan
