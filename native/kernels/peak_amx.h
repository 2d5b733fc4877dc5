// The peaks of AMX: products of bf16 tiles on registers alone, and with their operands loaded, which is what a product of matrices can come near.
#pragma once

#include "ops_amx.h"
#include "peak-inl.h"

namespace moespan {
namespace {

// Four sums, as amx-inl.h has them: a product waits for the last but three. `loaded`: each operand comes from L1 as often as it does there, a load for
// each product, and into its register as soon as that was read for the last time.
template <bool loaded>
float peak_bf16_amx(size_t rounds, float value) {
    alignas(64) float memory[4 * 16 * 16];
    for (float& word : memory) word = value;  // two bf16 each, what they are does not matter
    OpsAmx::TileRegisters tiles;
    tiles.load<4>(memory);
    tiles.load<5>(memory + 256);
    tiles.load<6>(memory + 512);
    tiles.load<7>(memory + 768);
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
    for (; rounds > 0; --rounds) {
        tiles.multiply<0, 4, 6>();
        tiles.multiply<1, 4, 7>();
        if constexpr (loaded) tiles.load<4>(memory);
        tiles.multiply<2, 5, 6>();
        if constexpr (loaded) tiles.load<6>(memory + 512);
        tiles.multiply<3, 5, 7>();
        if constexpr (loaded) tiles.load<5>(memory + 256);
        if constexpr (loaded) tiles.load<7>(memory + 768);
    }
    tiles.store<0>(memory);
    return memory[0];
}

constexpr double kAmxRound = 4 * 2.0 * 16 * 16 * 32;
constexpr PeakLoop kAmxPeaks[] = {{"bf16", kAmxRound, peak_bf16_amx<false>}, {"bf16_loaded", kAmxRound, peak_bf16_amx<true>}};

}  // namespace
}  // namespace moespan
