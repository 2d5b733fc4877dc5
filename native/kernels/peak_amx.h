// The peak of AMX: products of bf16 tiles on registers alone.
#pragma once

#include "ops_amx.h"
#include "peak-inl.h"

namespace moespan {
namespace {

// Four sums, as amx-inl.h has them: a product waits for the last but three.
inline float peak_bf16_amx(size_t rounds, float value) {
    alignas(64) float memory[16 * 16];
    for (float& word : memory) word = value;  // two bf16 each, what they are does not matter
    OpsAmx::TileRegisters tiles;
    tiles.load<4>(memory);
    tiles.load<5>(memory);
    tiles.load<6>(memory);
    tiles.load<7>(memory);
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
    for (; rounds > 0; --rounds) {
        tiles.multiply<0, 4, 6>();
        tiles.multiply<1, 4, 7>();
        tiles.multiply<2, 5, 6>();
        tiles.multiply<3, 5, 7>();
    }
    tiles.store<0>(memory);
    return memory[0];
}

constexpr PeakLoop kAmxPeak = {"bf16", 4 * 2.0 * 16 * 16 * 32, peak_bf16_amx};

}  // namespace
}  // namespace moespan
