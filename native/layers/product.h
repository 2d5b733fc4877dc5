// What linear, ffn and experts share: activations as the kernels read them, and a product by runs of rows, which threads take one by one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layers/linear.h"
#include "pool/pool.h"

namespace moespan {

// The kernels of a matrix's type; bindings have checked that there are some.
const FormatKernels& format_of(const KernelTable& kernels, const Matrix& matrix);

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
inline size_t round_up(size_t a, size_t multiple) { return ceil_div(a, multiple) * multiple; }

// Rows begin(0) .. rows - 1 of a matrix in runs of chunk_rows, the last of which may be shorter.
struct Chunks {
    size_t rows, chunk_rows;

    size_t count() const { return ceil_div(rows, chunk_rows); }
    size_t begin(size_t i) const { return i * chunk_rows; }
    size_t end(size_t i) const { return begin(i + 1) < rows ? begin(i + 1) : rows; }
};

// x @ matrix^T by runs of rows: gemv or gemm, whichever is the faster for so many tokens.
class Product {
  public:
    Product(const KernelTable& kernels, const Matrix& matrix)
        : matrix_(matrix), format_(format_of(kernels, matrix)), panel_rows_(kernels.panel_rows) {}

    const Matrix& matrix() const { return matrix_; }
    bool float_input() const { return format_.float_input; }

    // How to cut the rows for `threads` threads and n tokens.
    Chunks cut(size_t n, size_t threads) const;
    // The most rows of a chunk whose unpacked panels stay in the cache while n tokens meet them, a multiple of the panel.
    size_t fitting_rows(size_t n) const;
    // What compute needs of scratch.
    size_t scratch_bytes(size_t n, size_t rows) const;

    // Where row `first` of the i-th matrix lies; in tile order, `first` is that of a strip.
    const uint8_t* address(size_t i, size_t first) const {
        return matrix_.data + i * matrix_.bytes() + (matrix_.in_tiles ? first / kStripRows : first) * matrix_.row_bytes;
    }

    // Rows first .. last - 1 of the i-th matrix; row `first` of token 0 goes to out.data[0]. `next` is Rows::next.
    void compute(size_t i, size_t first, size_t last, const Tokens& x, const Outputs& out, uint8_t* scratch, const uint8_t* next = nullptr) const;

  private:
    bool by_panels(size_t n) const { return n >= (matrix_.in_tiles ? format_.tiles.gemm_from : format_.gemm_from); }
    // What a run of rows begins at a multiple of.
    size_t align(size_t n) const { return matrix_.in_tiles ? kStripRows : by_panels(n) ? panel_rows_ : 1; }

    const Matrix matrix_;
    const FormatKernels& format_;
    const size_t panel_rows_;
};

// Who reads some activations: float matrices read the floats, quantised ones the int8 form.
struct Readers {
    bool floats, codes;
};

inline Readers readers(const Product& a) { return {a.float_input(), !a.float_input()}; }
inline Readers readers(const Product& a, const Product& b) { return {a.float_input() || b.float_input(), !(a.float_input() && b.float_input())}; }

// Activations [rows, cols] in the forms that their readers want, in one of the pool's shared buffers.
class Activations {
  public:
    // With `values`, the floats are there already and only borrowed; without, put copies them.
    Activations(Pool& pool, Shared slot, size_t rows, size_t cols, Readers readers, const float* values = nullptr);

    // Whether put has anything to do.
    bool to_fill() const { return copy_ != nullptr || codes_ != nullptr; }

    // Columns first .. first + count - 1 of a row become values[0 .. count - 1]; with codes, both are multiples of 32. Several threads may fill
    // different parts.
    void put(size_t row, size_t first, const float* values, size_t count) const;

    // Rows first .. first + count - 1.
    Tokens rows(size_t first, size_t count) const;

  private:
    const KernelTable& kernels_;
    const size_t cols_;
    const float* values_;
    float* copy_ = nullptr;
    int8_t* codes_ = nullptr;
    float *scales_ = nullptr, *sums_ = nullptr, *half_sums_ = nullptr;
};

// The next array of `count` elements in memory that starts at `at`; at moves behind it, to a multiple of 64 bytes.
template <class T>
T* take(size_t& at, void* memory, size_t count) {
    T* array = reinterpret_cast<T*>(static_cast<uint8_t*>(memory) + at);
    at += round_up(count * sizeof(T), 64);
    return array;
}

}  // namespace moespan
