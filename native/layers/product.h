// What linear and ffn share: activations as the kernels read them, and a product cut into pieces for the pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layers/linear.h"
#include "pool/pool.h"

namespace moespan {

// The kernels of a matrix's type; bindings have checked that there are some.
const FormatKernels& format_of(const KernelTable& kernels, const Matrix& matrix);

// Activations [n, cols]: the floats, and their int8 form when a quantised matrix will read them. The int8 memory is one of the pool's
// shared slots.
class Activations {
  public:
    Activations(Pool& pool, int slot, const float* values, size_t n, size_t cols, bool quantised);

    const Tokens& tokens() const { return tokens_; }

    // Rounds columns first .. last - 1 of one token; both are multiples of 32. Nothing happens when no quantised matrix reads them. Several
    // threads may do different parts.
    void quantize(size_t token, size_t first, size_t last) const;

  private:
    const KernelTable& kernels_;
    Tokens tokens_;
    bool quantised_;
    int8_t* codes_ = nullptr;
    float *scales_ = nullptr, *sums_ = nullptr, *half_sums_ = nullptr;
};

// out [n, rows] (+)= x [n, cols] @ matrix^T in chunks of rows, each of which any thread may compute.
class Product {
  public:
    // Chunks start at multiples of `align` rows.
    Product(const Pool& pool, const Matrix& matrix, size_t n, size_t align = 1);

    // Cuts as `other` does, which has as many rows: chunk i is then the same rows of both.
    void cut_like(const Product& other) { chunk_rows_ = other.chunk_rows_; }

    size_t chunks() const { return (matrix_.rows + chunk_rows_ - 1) / chunk_rows_; }
    size_t begin(size_t chunk) const { return chunk * chunk_rows_; }
    size_t end(size_t chunk) const { return begin(chunk + 1) < matrix_.rows ? begin(chunk + 1) : matrix_.rows; }
    size_t scratch_bytes() const;
    bool float_input() const { return format_.float_input; }

    void compute(size_t chunk, const Tokens& x, float* out, bool accumulate, uint8_t* scratch) const;

  private:
    const Matrix matrix_;
    const FormatKernels& format_;
    const size_t panel_rows_;
    const bool gemm_;
    size_t chunk_rows_;
};

}  // namespace moespan
