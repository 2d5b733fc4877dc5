#include "layers/product.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace moespan {
namespace {

constexpr size_t kChunksPerThread = 4;        // so that a thread that lost its core for a while leaves its share to the others
constexpr size_t kMinChunkBytes = 8 * 1024;   // of weights, so that taking a chunk costs little beside computing it
constexpr size_t kPanelScratch = 192 * 1024;  // unpacked panels of one chunk: they share L2 with a block of activations

}  // namespace

const FormatKernels& format_of(const KernelTable& kernels, const Matrix& matrix) {
    const FormatKernels* end = kernels.formats + kernels.format_count;
    const FormatKernels* found = std::find_if(kernels.formats, end, [&](const FormatKernels& f) { return f.type_id == matrix.type_id; });
    assert(found != end);
    return *found;
}

Chunks Product::cut(size_t n, size_t threads) const {
    const size_t share = ceil_div(matrix_.rows, threads * kChunksPerThread);
    if (by_panels(n)) return {matrix_.rows, std::min(fitting_rows(n), round_up(share, align(n)))};
    const size_t least = ceil_div(kMinChunkBytes, matrix_.row_bytes) * (matrix_.in_tiles ? kStripRows : 1);
    return {matrix_.rows, round_up(std::max(share, least), align(n))};
}

size_t Product::fitting_rows(size_t n) const {
    if (!by_panels(n)) return round_up(matrix_.rows, align(n));
    const size_t fitting = std::max<size_t>(1, kPanelScratch / format_.panel_bytes(matrix_.cols)) * panel_rows_;
    return std::max(fitting / align(n), size_t{1}) * align(n);
}

size_t Product::scratch_bytes(size_t n, size_t rows) const {
    return by_panels(n) ? round_up(ceil_div(rows, panel_rows_) * format_.panel_bytes(matrix_.cols), 64) : 0;
}

void Product::compute(size_t i, size_t first, size_t last, const Tokens& x, const Outputs& out, uint8_t* scratch, const uint8_t* next) const {
    const Rows rows{address(i, first), matrix_.row_bytes, last - first, next};
    if (by_panels(x.n)) {
        (matrix_.in_tiles ? format_.tiles.gemm : format_.gemm)(rows, x, out, scratch);
    } else {
        (matrix_.in_tiles ? format_.tiles.gemv : format_.gemv)(rows, x, out);
    }
}

Activations::Activations(Pool& pool, Shared slot, size_t rows, size_t cols, Readers readers, const float* values)
    : kernels_(pool.kernels()), cols_(cols), values_(values) {
    const size_t floats = readers.floats && values == nullptr ? rows * cols : 0, groups = readers.codes ? rows * cols / 32 : 0;
    void* memory = pool.shared(slot, floats * sizeof(float) + groups * (32 + 4 * sizeof(float)) + 5 * 64);
    size_t at = 0;
    if (floats > 0) values_ = copy_ = take<float>(at, memory, floats);
    if (groups == 0) return;
    codes_ = take<int8_t>(at, memory, groups * 32);
    scales_ = take<float>(at, memory, groups);
    sums_ = take<float>(at, memory, groups);
    half_sums_ = take<float>(at, memory, 2 * groups);
}

void Activations::put(size_t row, size_t first, const float* values, size_t count) const {
    const size_t at = row * cols_ + first, group = at / 32;
    if (copy_ != nullptr) std::memcpy(copy_ + at, values, count * sizeof(float));
    if (codes_ != nullptr) kernels_.quantize(values, count, codes_ + at, scales_ + group, sums_ + group, half_sums_ + 2 * group);
}

Tokens Activations::rows(size_t first, size_t count) const {
    const size_t at = first * cols_, group = at / 32;
    Tokens tokens{count, cols_, nullptr, nullptr, nullptr, nullptr, nullptr};
    if (values_ != nullptr) tokens.values = values_ + at;
    if (codes_ == nullptr) return tokens;
    tokens.codes = codes_ + at;
    tokens.scales = scales_ + group;
    tokens.sums = sums_ + group;
    tokens.half_sums = half_sums_ + 2 * group;
    return tokens;
}

}  // namespace moespan
