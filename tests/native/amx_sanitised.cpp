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

template <class Tiles>
bool run(size_t rows, size_t cols, size_t n) {
    using Row = typename Tiles::RowOrder;
    const size_t row_bytes = cols / Row::kBlock * sizeof(typename Row::Block), strips = (rows + kTile - 1) / kTile;
    std::mt19937 random(1);
    std::vector<uint8_t> blocks(rows * row_bytes);
    for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(random() % 0x3c);  // halves of which none is inf or NaN
    Exact packed(strips * Strip<Tiles>::bytes(cols)), input((n + kTile - 1) / kTile * kTile * cols * 2), scratch(tile_scratch_bytes<Ops>(rows, n));
    for (size_t i = 0; i < strips; ++i) {
        const size_t count = rows - i * kTile < kTile ? rows - i * kTile : kTile;
        pack_strip<Ops, Tiles>(blocks.data() + i * kTile * row_bytes, row_bytes, count, Columns{0, cols, 0, 0}, packed.data + i * Strip<Tiles>::bytes(cols));
    }
    std::vector<float> x(cols), out(n * rows, NAN);
    for (size_t t = 0; t < n; ++t) {
        for (float& value : x) value = static_cast<float>(random() % 200) / 100 - 1;
        put_bf16<Ops>(x.data(), cols, reinterpret_cast<uint16_t*>(input.data) + t / kTile * kTile * cols + t % kTile * kTileColumns);
    }
    Tokens tokens{};
    tokens.n = n;
    tokens.cols = cols;
    tokens.bf16 = reinterpret_cast<const uint16_t*>(input.data);
    gemm_tiles<Ops, Tiles>({packed.data, Strip<Tiles>::bytes(cols), rows}, tokens, {out.data(), rows, false}, scratch.data);
    for (const float value : out) {
        if (!std::isfinite(value)) return false;
    }
    return true;
}

}  // namespace

int main() {
    bool good = true;
    for (const size_t n : {1, 15, 16, 17, 33}) {
        for (const size_t rows : {1, 16, 17, 33}) {
            good = good && run<Q4_KTiles<Ops>>(rows, 512, n) && run<Q6_KTiles<Ops>>(rows, 256, n);
            good = good && run<Q5_0Tiles<Ops>>(rows, 352, n) && run<IQ4_XSTiles<Ops>>(rows, 256, n);
        }
    }
    for (const size_t n : {64, 81, 96, 97, 113}) good = good && run<Q4_KTiles<Ops>>(49, 768, n) && run<Q4_0Tiles<Ops>>(33, 544, n);
    good = good && run<Q4_0Tiles<Ops>>(17, 32, 530) && run<Q4_0Tiles<Ops>>(17, 544, 34);
    if (good) std::puts("ok");
    return good ? 0 : 1;
}
