// The codebooks of the IQ types: a block stores which entry of a grid each run of 8 (or 4) values is, and their signs apart.
//
// One copy for all instruction sets, in grids.cpp; source: the tables of the gguf Python package, see make_grids.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moespan {

// Entry is the values of one entry as bytes, the first lowest: uint64_t for 8 of them, uint32_t for 4.
template <class Entry, size_t count>
struct Grid {
    alignas(64) Entry entries[count];
};

extern const Grid<uint64_t, 2048> kGridIQ1;     // 8 * (v + 1) of values v = -1, 0, 1: IQ1_S and IQ1_M, whose shifts of 1/8 thus are whole numbers
extern const Grid<uint64_t, 256> kGridIQ2_XXS;  // magnitudes, as all that follow
extern const Grid<uint64_t, 512> kGridIQ2_XS;
extern const Grid<uint64_t, 1024> kGridIQ2_S;
extern const Grid<uint32_t, 256> kGridIQ3_XXS;
extern const Grid<uint32_t, 512> kGridIQ3_S;

// Where the high bits of picks lie, beside the bytes with their low 8: in units of `unit_bytes` bytes, a unit for `picks` of them in turn, each
// `bits` bits wide and `stride` bits behind the one before.
struct PickBits {
    int unit_bytes, picks, stride, bits;
};

// The 16 values that 4 bits stand for in IQ4_NL and IQ4_XS, and in MXFP4 (doubled, so that they are whole).
extern const Grid<int8_t, 16> kValuesIQ4, kValuesMXFP4;

}  // namespace moespan
