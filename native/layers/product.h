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

// Where weights are streamed, what each thread takes last is cut into so many.
constexpr size_t kLastParts = 4;

// Rows begin(0) .. rows - 1 of a matrix in runs, which threads take in this order: `large` runs of chunk_rows, then shorter ones of last_rows, so that whoever
// finds none left has not long to wait for the others. The last may be shorter yet.
struct Chunks {
    size_t rows, chunk_rows, large, last_rows;

    static Chunks even(size_t rows, size_t chunk_rows) { return {rows, chunk_rows, rows / chunk_rows, chunk_rows}; }

    size_t count() const { return large + ceil_div(rows - begin(large), last_rows); }
    size_t begin(size_t i) const { return i <= large ? i * chunk_rows : large * chunk_rows + (i - large) * last_rows; }
    size_t end(size_t i) const { return begin(i + 1) < rows ? begin(i + 1) : rows; }
};

// Which forms of some activations are read: floats by float matrices and the int8 form by quantised ones, or by both the bfloat16 form where tiles do the
// product.
struct Readers {
    bool floats = false, codes = false, bf16 = false;

    Readers operator|(const Readers& other) const { return {floats || other.floats, codes || other.codes, bf16 || other.bf16}; }
};

// x @ matrix^T by runs of rows: gemv, gemm or bf16 tiles, whichever is the fastest for so many tokens.
class Product {
  public:
    Product(const KernelTable& kernels, const Matrix& matrix);

    const Matrix& matrix() const { return matrix_; }
    Readers reads(size_t n) const { return {format_.float_input && !by_bf16(n), !format_.float_input && !by_bf16(n), by_bf16(n)}; }

    // Whether products with n tokens read each weight once, and so wait for memory rather than for arithmetic.
    bool streams(size_t n) const { return !by_bf16(n) && !by_panels(n); }

    // How to cut the rows for `threads` threads and n tokens.
    Chunks cut(size_t n, size_t threads) const;
    // The most rows of a chunk whose unpacked panels, or sums, stay in the cache while n tokens meet them, a multiple of the panel.
    size_t fitting_rows(size_t n) const;
    // What a row costs with n tokens, in products of int8 with a token.
    size_t row_cost(size_t n) const;
    // What compute needs of scratch.
    size_t scratch_bytes(size_t n, size_t rows) const;

    // Where row `first` of the i-th matrix lies; in tile order, `first` is that of a strip.
    const uint8_t* address(size_t i, size_t first) const {
        return matrix_.data + i * matrix_.bytes() + (matrix_.in_tiles ? first / kStripRows : first) * matrix_.row_bytes;
    }

    // Whether gate, this matrix, and `up` can be multiplied and joined in one pass; then out [n, last - first] = silu(x @ gate^T) * (x @ up^T) of rows first
    // .. last - 1, with scratch for twice as many.
    bool gates(const Product& up, size_t n) const { return by_bf16(n) && up.bf16_ == bf16_; }
    void compute_gated(const Product& up, size_t i, size_t first, size_t last, const Tokens& x, float* out, uint8_t* scratch) const;

    // Rows first .. last - 1 of the i-th matrix; row `first` of token 0 goes to out.data[0]. `next` is Rows::next.
    void compute(size_t i, size_t first, size_t last, const Tokens& x, const Outputs& out, uint8_t* scratch, const uint8_t* next = nullptr) const;

  private:
    bool by_bf16(size_t n) const { return bf16_ != nullptr && n >= kernels_.bf16->from; }
    bool by_panels(size_t n) const { return !by_bf16(n) && n >= (matrix_.in_tiles ? format_.tiles.gemm_from : format_.gemm_from); }
    // What a run of rows begins at a multiple of.
    size_t align(size_t n) const { return matrix_.in_tiles || by_bf16(n) ? kStripRows : by_panels(n) ? kernels_.panel_rows : 1; }

    const KernelTable& kernels_;
    const Matrix matrix_;
    const FormatKernels& format_;
    const Bf16Product* const bf16_;  // null where the matrix has none
};

// Rows first .. first + count - 1 of some activations, which products read together: all of them, or an expert's, or a head's, and the index of that.
struct Run {
    size_t first, count, index;
};

// Activations [rows, cols] in the forms that their readers want, in one of the pool's shared buffers.
class Activations {
  public:
    // In `runs` runs. With `values`, the floats are there already and only borrowed; without, put copies them.
    Activations(Pool& pool, Shared slot, size_t rows, size_t runs, size_t cols, Readers readers, const float* values = nullptr);

    // Whether put has anything to do.
    bool to_fill() const { return copy_ != nullptr || codes_ != nullptr || bf16_ != nullptr; }

    // Columns first .. first + count - 1 of the i-th row of a run become values[0 .. count - 1], in the forms that its readers want; but for floats alone,
    // both are multiples of 32. Several threads may fill different parts.
    void put(const Run& run, size_t i, size_t first, const float* values, size_t count, Readers readers) const;

    Tokens rows(const Run& run) const;

  private:
    // The tiles of a run: 16 rows each, so that up to 15 more are there than it has.
    uint16_t* bf16_of(const Run& run) const { return bf16_ + (run.first + run.index * (kStripRows - 1)) * cols_; }

    const KernelTable& kernels_;
    const size_t cols_;
    const float* values_;
    float* copy_ = nullptr;
    int8_t* codes_ = nullptr;
    float *scales_ = nullptr, *sums_ = nullptr, *half_sums_ = nullptr;
    uint16_t* bf16_ = nullptr;
};

// The next array of `count` elements in memory that starts at `at`; at moves behind it, to a multiple of 64 bytes.
template <class T>
T* take(size_t& at, void* memory, size_t count) {
    T* array = reinterpret_cast<T*>(static_cast<uint8_t*>(memory) + at);
    at += round_up(count * sizeof(T), 64);
    return array;
}

}  // namespace moespan
