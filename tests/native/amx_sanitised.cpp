// The body of AMX over emulated tiles, with buffers that end where they must, for sanitizers to watch: prints "ok".
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/amx-inl.h"
#include "kernels/ops_amx_scalar.h"

using namespace moespan;

namespace {

using Ops = OpsAmxScalar;

// A buffer of exactly so many bytes, aligned to 64.
struct Exact {
    explicit Exact(size_t bytes) : data(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {}
    ~Exact() { std::free(data); }
    uint8_t* data;
};

// Bytes of which none makes a half, or a bf16, that is inf or NaN.
std::vector<uint8_t> random_bytes(size_t count) {
    std::mt19937 random(1);
    std::vector<uint8_t> bytes(count);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random() % 0x3c);
    return bytes;
}

// Whether all results of gemm(tokens, outputs, scratch) are finite.
template <class Gemm>
bool run_with(size_t rows, size_t cols, size_t n, const Gemm& gemm) {
    std::mt19937 random(1);
    Exact input((n + kTile - 1) / kTile * kTile * cols * 2), scratch(tile_scratch_bytes<Ops>(rows, n));
    std::vector<float> x(cols), out(n * rows, NAN);
    for (size_t t = 0; t < n; ++t) {
        for (float& value : x) value = static_cast<float>(random() % 200) / 100 - 1;
        put_bf16<Ops>(x.data(), cols, reinterpret_cast<uint16_t*>(input.data) + t / kTile * kTile * cols + t % kTile * kTileColumns);
    }
    Tokens tokens{};
    tokens.n = n;
    tokens.cols = cols;
    tokens.bf16 = reinterpret_cast<const uint16_t*>(input.data);
    gemm(tokens, Outputs{out.data(), rows, false}, scratch.data);
    for (const float value : out) {
        if (!std::isfinite(value)) return false;
    }
    return true;
}

template <class Tiles>
bool run(size_t rows, size_t cols, size_t n) {
    using Row = typename Tiles::RowOrder;
    const size_t row_bytes = cols / Row::kBlock * sizeof(typename Row::Block), strips = (rows + kTile - 1) / kTile;
    const std::vector<uint8_t> blocks = random_bytes(rows * row_bytes);
    Exact packed(strips * Strip<Tiles>::bytes(cols));
    for (size_t i = 0; i < strips; ++i) {
        const size_t count = rows - i * kTile < kTile ? rows - i * kTile : kTile;
        pack_strip<Ops, Tiles>(blocks.data() + i * kTile * row_bytes, row_bytes, count, Columns{0, cols, 0, 0}, packed.data + i * Strip<Tiles>::bytes(cols));
    }
    return run_with(rows, cols, n, [&](const Tokens& x, const Outputs& out, uint8_t* scratch) {
        gemm_tiles<Ops, Tiles>({packed.data, Strip<Tiles>::bytes(cols), rows}, x, out, scratch);
    });
}

template <class Format>
bool run_rows(size_t rows, size_t cols, size_t n) {
    const size_t row_bytes = cols * row_format<Ops, Format>().span_bytes / kSpan;
    const std::vector<uint8_t> blocks = random_bytes(rows * row_bytes);
    return run_with(rows, cols, n, [&](const Tokens& x, const Outputs& out, uint8_t* scratch) {
        gemm_rows<Ops, Format>({blocks.data(), row_bytes, rows}, x, out, scratch);
    });
}

}  // namespace

int main() {
    bool good = true;
    for (const size_t n : {1, 15, 16, 17, 33}) {
        for (const size_t rows : {1, 16, 17, 33}) {
            good = good && run<Q4_KTiles<Ops>>(rows, 512, n) && run<Q6_KTiles<Ops>>(rows, 256, n);
            good = good && run<Q5_0Tiles<Ops>>(rows, 352, n) && run<IQ4_XSTiles<Ops>>(rows, 256, n);
            good = good && run_rows<IQ1_S<Ops>>(rows, 512, n) && run_rows<IQ1_M<Ops>>(rows, 256, n) && run_rows<IQ2_XXS<Ops>>(rows, 256, n);
            good = good && run_rows<IQ2_XS<Ops>>(rows, 256, n) && run_rows<IQ2_S<Ops>>(rows, 512, n) && run_rows<IQ3_XXS<Ops>>(rows, 256, n);
            good = good && run_rows<IQ3_S<Ops>>(rows, 256, n) && run_rows<F16<Ops>>(rows, 288, n) && run_rows<BF16<Ops>>(rows, 32, n);
        }
    }
    for (const size_t n : {64, 81, 96, 97, 113}) good = good && run<Q4_KTiles<Ops>>(49, 768, n) && run<Q4_0Tiles<Ops>>(33, 544, n);
    for (const size_t n : {64, 97, 113}) good = good && run_rows<IQ1_S<Ops>>(49, 768, n) && run_rows<BF16<Ops>>(33, 544, n);
    good = good && run<Q4_0Tiles<Ops>>(17, 32, 530) && run<Q4_0Tiles<Ops>>(17, 544, 34);
    if (good) std::puts("ok");
    return good ? 0 : 1;
}
