#include "layers/product.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace moespan {
namespace {

constexpr size_t kChunksPerThread = 4;        // so that a thread that lost its core for a while leaves its share to the others
constexpr size_t kMinChunkBytes = 8 * 1024;   // of weights, so that taking a chunk costs little beside computing it
constexpr size_t kPanelScratch = 192 * 1024;  // unpacked panels of one chunk: they share L2 with a block of activations
constexpr size_t kSumScratch = 256 * 1024;    // sums of bf16 tiles, likewise
constexpr size_t kMinStrips = 8, kMaxStrips = 16;  // of a chunk in bf16: each chunk reads all tokens again
constexpr size_t kTileColumns = 32;           // what bf16 tiles take at once
constexpr size_t kRowCost = 4;                // what reading a row of weights once costs, in products with a token

}  // namespace

const FormatKernels& format_of(const KernelTable& kernels, const Matrix& matrix) {
    const FormatKernels* end = kernels.formats + kernels.format_count;
    const FormatKernels* found = std::find_if(kernels.formats, end, [&](const FormatKernels& f) { return f.type_id == matrix.type_id; });
    assert(found != end);
    return *found;
}

namespace {

const Bf16Product* bf16_of(const KernelTable& kernels, const Matrix& matrix) {
    if (kernels.bf16 == nullptr || matrix.cols % kTileColumns != 0) return nullptr;
    const Bf16Product* end = kernels.bf16->products + kernels.bf16->count;
    const auto fits = [&](const Bf16Product& p) { return p.type_id == matrix.type_id && p.from_tiles == matrix.in_tiles; };
    const Bf16Product* found = std::find_if(kernels.bf16->products, end, fits);
    return found == end ? nullptr : found;
}

// The chunks, at most `most` strips each, that leave the threads the least to wait for at the end.
size_t even_strips(size_t strips, size_t most, size_t threads) {
    size_t best = 1, least = SIZE_MAX;
    for (size_t rounds = 2; rounds <= 6; ++rounds) {
        const size_t chunk = std::min(most, ceil_div(strips, threads * rounds)), last = ceil_div(ceil_div(strips, chunk), threads) * chunk;
        if (last < least) {
            best = chunk;
            least = last;
        }
    }
    return best;
}

}  // namespace

Product::Product(const KernelTable& kernels, const Matrix& matrix)
    : kernels_(kernels), matrix_(matrix), format_(format_of(kernels, matrix)), bf16_(bf16_of(kernels, matrix)) {}

Chunks Product::cut(size_t n, size_t threads) const {
    if (by_bf16(n)) return Chunks::even(matrix_.rows, even_strips(ceil_div(matrix_.rows, kStripRows), fitting_rows(n) / kStripRows, threads) * kStripRows);
    const size_t share = ceil_div(matrix_.rows, threads * kChunksPerThread);
    if (by_panels(n)) return Chunks::even(matrix_.rows, std::min(fitting_rows(n), round_up(share, align(n))));
    const size_t least = ceil_div(kMinChunkBytes, matrix_.row_bytes) * (matrix_.in_tiles ? kStripRows : 1);
    const size_t chunk = round_up(std::max(share, least), align(n)), last = round_up(std::max(ceil_div(chunk, kLastParts), least), align(n));
    return {matrix_.rows, chunk, (matrix_.rows - std::min(matrix_.rows, threads * chunk)) / chunk, std::min(last, chunk)};
}

size_t Product::fitting_rows(size_t n) const {
    if (by_bf16(n)) return std::clamp(kSumScratch / (n * sizeof(float)) / kStripRows, kMinStrips, kMaxStrips) * kStripRows;
    if (!by_panels(n)) return round_up(matrix_.rows, align(n));
    const size_t fitting = std::max<size_t>(1, kPanelScratch / format_.panel_bytes(matrix_.cols)) * kernels_.panel_rows;
    return std::max(fitting / align(n), size_t{1}) * align(n);
}

size_t Product::row_cost(size_t n) const {
    // Opening to bf16 costs as much as tiles do with 48 tokens, of which 16 are one product of tiles; int8 is about a quarter as fast.
    return by_bf16(n) ? 12 + round_up(n, 16) / 4 : kRowCost + n;
}

size_t Product::scratch_bytes(size_t n, size_t rows) const {
    if (by_bf16(n)) return round_up(kernels_.bf16->scratch_bytes(rows, n), 64);
    return by_panels(n) ? round_up(ceil_div(rows, kernels_.panel_rows) * format_.panel_bytes(matrix_.cols), 64) : 0;
}

void Product::compute(size_t i, size_t first, size_t last, const Tokens& x, const Outputs& out, uint8_t* scratch, const uint8_t* next) const {
    const Rows rows{address(i, first), matrix_.row_bytes, last - first, next};
    if (by_bf16(x.n)) {
        bf16_->gemm(rows, x, out, scratch);
    } else if (by_panels(x.n)) {
        (matrix_.in_tiles ? format_.tiles.gemm : format_.gemm)(rows, x, out, scratch);
    } else {
        (matrix_.in_tiles ? format_.tiles.gemv : format_.gemv)(rows, x, out);
    }
}

void Product::compute_gated(const Product& up, size_t i, size_t first, size_t last, const Tokens& x, float* out, uint8_t* scratch) const {
    bf16_->gate({address(i, first), matrix_.row_bytes, last - first}, {up.address(i, first), matrix_.row_bytes, last - first}, x, out, scratch);
}

Activations::Activations(Pool& pool, Shared slot, size_t rows, size_t runs, size_t cols, Readers readers, const float* values)
    : kernels_(pool.kernels()), cols_(cols), values_(values) {
    const size_t floats = readers.floats && values == nullptr ? rows * cols : 0, groups = readers.codes ? rows * cols / 32 : 0;
    const size_t halves = readers.bf16 ? (rows + runs * (kStripRows - 1)) * cols : 0;
    void* memory = pool.shared(slot, floats * sizeof(float) + groups * (32 + 4 * sizeof(float)) + halves * sizeof(uint16_t) + 6 * 64);
    size_t at = 0;
    if (floats > 0) values_ = copy_ = take<float>(at, memory, floats);
    if (groups > 0) {
        codes_ = take<int8_t>(at, memory, groups * 32);
        scales_ = take<float>(at, memory, groups);
        sums_ = take<float>(at, memory, groups);
        half_sums_ = take<float>(at, memory, 2 * groups);
    }
    if (halves > 0) bf16_ = take<uint16_t>(at, memory, halves);
}

void Activations::put(const Run& run, size_t i, size_t first, const float* values, size_t count, Readers readers) const {
    const size_t at = (run.first + i) * cols_ + first, group = at / 32;
    if (copy_ != nullptr && readers.floats) std::memcpy(copy_ + at, values, count * sizeof(float));
    if (readers.codes) kernels_.quantize(values, count, codes_ + at, scales_ + group, sums_ + group, half_sums_ + 2 * group);
    if (readers.bf16) kernels_.bf16->put(values, count, bf16_of(run) + i / kStripRows * kStripRows * cols_ + i % kStripRows * 32 + first * kStripRows);
}

Tokens Activations::rows(const Run& run) const {
    const size_t at = run.first * cols_, group = at / 32;
    Tokens tokens{run.count, cols_, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    if (values_ != nullptr) tokens.values = values_ + at;
    if (bf16_ != nullptr) tokens.bf16 = bf16_of(run);
    if (codes_ == nullptr) return tokens;
    tokens.codes = codes_ + at;
    tokens.scales = scales_ + group;
    tokens.sums = sums_ + group;
    tokens.half_sums = half_sums_ + 2 * group;
    return tokens;
}

}  // namespace moespan
