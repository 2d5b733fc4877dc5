#include "quant/grids.h"

namespace moespan {
namespace {

#include "quant/grid_codes.inc"

// Entries of indices into `levels`, `bits` each, to entries of bytes.
template <class Entry, size_t count, size_t level_count>
constexpr Grid<Entry, count> expanded(const uint16_t (&codes)[count], const uint8_t (&levels)[level_count]) {
    constexpr int bits = level_count > 4 ? 3 : 2;
    Grid<Entry, count> grid{};
    for (size_t i = 0; i < count; ++i) {
        for (size_t k = 0; k < sizeof(Entry); ++k) grid.entries[i] |= Entry{levels[codes[i] >> bits * k & ((1 << bits) - 1)]} << 8 * k;
    }
    return grid;
}

constexpr uint8_t kLevels1[] = {0, 8, 16};
constexpr uint8_t kLevels2[] = {8, 25, 43};
constexpr uint8_t kLevels3_XXS[] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr uint8_t kLevels3_S[] = {1, 3, 5, 7, 9, 11, 13, 15};

}  // namespace

constinit const Grid<uint64_t, 2048> kGridIQ1 = expanded<uint64_t>(kCodesIQ1_S, kLevels1);
constinit const Grid<uint64_t, 256> kGridIQ2_XXS = expanded<uint64_t>(kCodesIQ2_XXS, kLevels2);
constinit const Grid<uint64_t, 512> kGridIQ2_XS = expanded<uint64_t>(kCodesIQ2_XS, kLevels2);
constinit const Grid<uint64_t, 1024> kGridIQ2_S = expanded<uint64_t>(kCodesIQ2_S, kLevels2);
constinit const Grid<uint32_t, 256> kGridIQ3_XXS = expanded<uint32_t>(kCodesIQ3_XXS, kLevels3_XXS);
constinit const Grid<uint32_t, 512> kGridIQ3_S = expanded<uint32_t>(kCodesIQ3_S, kLevels3_S);

constinit const Grid<int8_t, 16> kValuesIQ4 = {{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};
constinit const Grid<int8_t, 16> kValuesMXFP4 = {{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}};

}  // namespace moespan
