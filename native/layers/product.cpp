#include "layers/product.h"

#include <algorithm>
#include <cassert>

namespace moespan {
namespace {

constexpr size_t kChunksPerThread = 4;          // so that a thread that lost its core for a while leaves its share to the others
constexpr size_t kMinChunkBytes = 8 * 1024;     // of weights, so that taking a chunk costs little beside computing it
constexpr size_t kPanelScratch = 192 * 1024;    // unpacked panels of one chunk: they share L2 with a block of activations

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
size_t round_up(size_t a, size_t multiple) { return ceil_div(a, multiple) * multiple; }

// The next array of `count` elements in memory that starts at `at`; at moves behind it, to a multiple of 64 bytes.
template <class T>
T* take(size_t& at, uint8_t* memory, size_t count) {
    T* array = reinterpret_cast<T*>(memory + at);
    at += round_up(count * sizeof(T), 64);
    return array;
}

}  // namespace

const FormatKernels& format_of(const KernelTable& kernels, const Matrix& matrix) {
    const FormatKernels* end = kernels.formats + kernels.format_count;
    const FormatKernels* found = std::find_if(kernels.formats, end, [&](const FormatKernels& f) { return f.type_id == matrix.type_id; });
    assert(found != end);
    return *found;
}

Activations::Activations(Pool& pool, int slot, const float* values, size_t n, size_t cols, bool quantised)
    : kernels_(pool.kernels()), tokens_{n, cols, values, nullptr, nullptr, nullptr, nullptr}, quantised_(quantised) {
    if (!quantised) return;
    const size_t groups = n * cols / 32;
    auto* memory = static_cast<uint8_t*>(pool.shared(slot, groups * (32 + 4 * sizeof(float)) + 4 * 64));
    size_t at = 0;
    tokens_.codes = codes_ = take<int8_t>(at, memory, groups * 32);
    tokens_.scales = scales_ = take<float>(at, memory, groups);
    tokens_.sums = sums_ = take<float>(at, memory, groups);
    tokens_.half_sums = half_sums_ = take<float>(at, memory, 2 * groups);
}

void Activations::quantize(size_t token, size_t first, size_t last) const {
    if (!quantised_) return;
    const size_t value = token * tokens_.cols + first, group = value / 32;
    kernels_.quantize(tokens_.values + value, last - first, codes_ + value, scales_ + group, sums_ + group, half_sums_ + 2 * group);
}

Product::Product(const Pool& pool, const Matrix& matrix, size_t n, size_t align)
    : matrix_(matrix), format_(format_of(pool.kernels(), matrix)), panel_rows_(pool.kernels().panel_rows), gemm_(n >= format_.gemm_from) {
    const size_t share = ceil_div(matrix.rows, pool.threads() * kChunksPerThread);
    if (gemm_) {
        const size_t fit = std::max<size_t>(1, kPanelScratch / format_.panel_bytes(matrix.cols)) * panel_rows_;
        chunk_rows_ = std::min(fit, round_up(share, panel_rows_));
    } else {
        chunk_rows_ = std::max(share, ceil_div(kMinChunkBytes, matrix.row_bytes));
    }
    chunk_rows_ = round_up(chunk_rows_, align);
}

size_t Product::scratch_bytes() const { return gemm_ ? ceil_div(chunk_rows_, panel_rows_) * format_.panel_bytes(matrix_.cols) : 0; }

void Product::compute(size_t chunk, const Tokens& x, float* out, bool accumulate, uint8_t* scratch) const {
    const size_t first = begin(chunk);
    const Rows rows{matrix_.data + first * matrix_.row_bytes, matrix_.row_bytes, end(chunk) - first};
    const Outputs outputs{out + first, matrix_.rows, accumulate};
    if (gemm_) {
        format_.gemm(rows, x, outputs, scratch);
    } else {
        format_.gemv(rows, x, outputs);
    }
}

}  // namespace moespan
