// Tile order: how the matrices of quantised experts and dense layers lie in memory once they are loaded, for decode and prefill alike.
//
// A strip is 16 rows side by side, so that a vector lane is a row and nothing is summed across lanes. It has the file's own bits, turned:
//   codes   for each sub-block of 32 columns, kBits lines of 64 bytes
//   scales  for each span of 256 columns (or a shorter last one), as the format says
// A step is 4 columns of the 16 rows, [16][4] codes of a byte: what one VNNI or maddubs instruction meets with 4 activations, broadcast. A
// sub-block has 8 steps, and its lines hold them in planes, the low bits of the codes first:
//   8 bits  8 lines, one step each
//   4 bits  4 lines; line s has step s in the low nibbles, step s + 4 in the high ones
//   2 bits  2 lines; line l has step 2 f + l in its bits 2 f and 2 f + 1
//   1 bit   1 line; bit s belongs to step s
// so codes of 5 bits are a plane of 4 and one of 1. An instruction set with 8 lanes takes each line in two parts, rows 0..7 and 8..15.
//
// To add a format that runs in row order already (formats-inl.h): how many bits its codes have, how a span's scales are packed, how a vector
// of them is read; then a line in table-inl.h. The K-quants are in tiles_k-inl.h.
#pragma once

#include "formats-inl.h"
#include "isa/kernels.h"

namespace moespan {
namespace {

constexpr int kLine = 64, kSteps = 8;

template <class Ops>
constexpr int kParts = (int)kStripRows / Ops::kLanes;

// 16 halves.
template <class Ops>
inline void load_halves(const uint8_t* p, typename Ops::Reg* parts) {
    for (int part = 0; part < kParts<Ops>; ++part) parts[part] = Ops::load_half((const uint16_t*)p + part * Ops::kLanes);
}

// The bit planes of a sub-block.
template <class Ops, int bits>
struct Planes {
    using Step = typename Ops::Step;
    static constexpr bool kEight = bits == 8, kFour = !kEight && bits & 4, kTwo = !kEight && bits & 2, kOne = !kEight && bits & 1;
    static constexpr int kTwoBase = kFour ? 4 : 0, kOneBase = kTwoBase + (kTwo ? 2 : 0);  // where their bits stand in a code
    static constexpr size_t kBytes = bits * kLine;

    // steps [8][64], a code a byte -> lines.
    static void pack(const uint8_t* steps, uint8_t* lines) {
        memset(lines, 0, kBytes);
        if constexpr (kEight) memcpy(lines, steps, kBytes);
        if constexpr (kFour) {
            for (int s = 0; s < kSteps; ++s) add(steps + s * kLine, 0, 15, 4 * (s / 4), lines + s % 4 * kLine);
            lines += 4 * kLine;
        }
        if constexpr (kTwo) {
            for (int s = 0; s < kSteps; ++s) add(steps + s * kLine, kTwoBase, 3, 2 * (s / 2), lines + s % 2 * kLine);
            lines += 2 * kLine;
        }
        if constexpr (kOne) {
            for (int s = 0; s < kSteps; ++s) add(steps + s * kLine, kOneBase, 1, s, lines);
        }
    }

    // One part's codes; `lines` stands at its first byte.
    static void unpack(const uint8_t* lines, Step* steps) {
        if constexpr (kEight) {
            for (int s = 0; s < kSteps; ++s) steps[s] = Ops::load_step(lines + s * kLine);
        }
        if constexpr (kFour) {
            for (int l = 0; l < 4; ++l) {
                const Step line = Ops::load_step(lines + l * kLine);
                steps[l] = Ops::template field<0, 15>(line);
                steps[l + 4] = Ops::template field<4, 15>(line);
            }
            lines += 4 * kLine;
        }
        if constexpr (kTwo) {
            for (int l = 0; l < 2; ++l) {
                const Step line = Ops::load_step(lines + l * kLine);
                put<0 - kTwoBase, 3 << kTwoBase, kFour>(line, steps[l]);
                put<2 - kTwoBase, 3 << kTwoBase, kFour>(line, steps[l + 2]);
                put<4 - kTwoBase, 3 << kTwoBase, kFour>(line, steps[l + 4]);
                put<6 - kTwoBase, 3 << kTwoBase, kFour>(line, steps[l + 6]);
            }
            lines += 2 * kLine;
        }
        if constexpr (kOne) {
            const Step line = Ops::load_step(lines);
            put<0 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[0]);
            put<1 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[1]);
            put<2 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[2]);
            put<3 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[3]);
            put<4 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[4]);
            put<5 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[5]);
            put<6 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[6]);
            put<7 - kOneBase, 1 << kOneBase, bits != 1>(line, steps[7]);
        }
    }

  private:
    // line |= ((step >> from) & mask) << to, byte by byte.
    static void add(const uint8_t* step, int from, int mask, int to, uint8_t* line) {
        for (int i = 0; i < kLine; ++i) line[i] |= (uint8_t)((step[i] >> from & mask) << to);
    }
    // step (|)= the field of `mask` that lies `shift` higher in the line (or lower, where it is negative).
    template <int shift, int mask, bool kJoin>
    static void put(Step line, Step& step) {
        const Step bits_of = Ops::template field<shift, mask>(line);
        step = kJoin ? Ops::or_step(step, bits_of) : bits_of;
    }
};

// One part of a sub-block's codes; those of a format with a table of 16 `values` are looked up there.
template <class Ops, class Tiles>
inline void open_steps(const uint8_t* lines, typename Ops::Step* steps) {
    Planes<Ops, Tiles::kBits>::unpack(lines, steps);
    if constexpr (requires { Tiles::values(); }) {
        for (int s = 0; s < kSteps; ++s) steps[s] = Ops::lookup_step(steps[s], Tiles::values());
    }
}

// Formats with a half for each block of 32, and one more for its minimum where kMin.
template <class Ops, class Row, int bits, int kZeroPoint, bool kMin>
struct SimpleTiles : Row {
    using RowOrder = Row;
    static constexpr int kBits = bits;
    static constexpr size_t kSubScaleBytes = (kMin ? 2 : 1) * kStripRows * sizeof(uint16_t);

    static void pack_scales(const uint8_t* const* spans, int, int count, uint8_t* out) {
        for (int j = 0; j < count; ++j, out += kSubScaleBytes) {
            for (size_t r = 0; r < kStripRows; ++r) {
                const uint8_t* block = spans[r] + j * sizeof(typename Row::Block);
                memcpy(out + 2 * r, block, 2);
                if (kMin) memcpy(out + 2 * kStripRows + 2 * r, block + 2, 2);
            }
        }
    }

    struct SpanScales {
        const uint8_t* packed;
        SpanScales(const uint8_t* p, int) : packed(p) {}
        typename Ops::Reg scale(int j, int part) const { return Ops::load_half((const uint16_t*)(packed + j * kSubScaleBytes) + part * Ops::kLanes); }
        typename Ops::Reg offset(int j, int part, typename Ops::Reg scale) const {
            if constexpr (kMin) return Ops::load_half((const uint16_t*)(packed + j * kSubScaleBytes) + kStripRows + part * Ops::kLanes);
            return Ops::mul(scale, Ops::broadcast((float)-kZeroPoint));
        }
    };
};

template <class Ops>
using Q4_0Tiles = SimpleTiles<Ops, Q4_0<Ops>, 4, 8, false>;
template <class Ops>
using Q4_1Tiles = SimpleTiles<Ops, Q4_1<Ops>, 4, 0, true>;
template <class Ops>
using Q5_0Tiles = SimpleTiles<Ops, Q5_0<Ops>, 5, 16, false>;
template <class Ops>
using Q5_1Tiles = SimpleTiles<Ops, Q5_1<Ops>, 5, 0, true>;
template <class Ops>
using Q8_0Tiles = SimpleTiles<Ops, Q8_0<Ops>, 8, 0, false>;

// The bytes of a strip: the codes of all columns, then their scales, up to a whole line. A K-quant's span has all its scales, however few of its columns
// are there.
template <class Tiles>
struct Strip {
    static constexpr size_t kScaledSubs = Tiles::kBlock / kSubBlock;
    static size_t code_bytes(size_t cols) { return cols / kSubBlock * Tiles::kBits * kLine; }
    static size_t scale_bytes(size_t cols) { return (cols / kSubBlock + kScaledSubs - 1) / kScaledSubs * kScaledSubs * Tiles::kSubScaleBytes; }
    static size_t bytes(size_t cols) { return (code_bytes(cols) + scale_bytes(cols) + kLine - 1) / kLine * kLine; }
};

// Columns col .. col + width - 1, at most a span and of one K-quant's block, of up to 16 rows: their codes to `codes`, their scales to `scales`. Lanes of
// rows that are not there repeat the last one, and their results are never stored.
template <class Ops, class Tiles>
void pack_span(const uint8_t* w, size_t row_bytes, size_t row_count, size_t col, size_t width, uint8_t* codes, uint8_t* scales) {
    const int from = (int)(col % Tiles::kBlock / kSubBlock), count = (int)(width / kSubBlock);
    const uint8_t *first = w + col / Tiles::kBlock * sizeof(typename Tiles::Block), *spans[kStripRows];
    for (size_t r = 0; r < kStripRows; ++r) spans[r] = first + (r < row_count ? r : row_count - 1) * row_bytes;
    for (int j = 0; j < count; ++j, codes += Planes<Ops, Tiles::kBits>::kBytes) {
        uint8_t steps[kSteps * kLine];
        for (size_t eight = 0; eight < kStripRows; eight += 8) {
            typename Ops::Codes rows[8];
            for (int r = 0; r < 8; ++r) rows[r] = Tiles::codes(spans[eight + r], from + j);
            Ops::store_transposed(rows, steps + 4 * eight, kLine);
        }
        Planes<Ops, Tiles::kBits>::pack(steps, codes);
    }
    Tiles::pack_scales(spans, from, count, scales);
}

template <class Ops, class Tiles>
void pack_strip(const uint8_t* w, size_t row_bytes, size_t row_count, const Columns& columns, uint8_t* strip) {
    uint8_t* scales = strip + Strip<Tiles>::code_bytes(columns.count + columns.part_count);
    const auto pack = [&](size_t col, size_t width) {
        pack_span<Ops, Tiles>(w, row_bytes, row_count, col, width, strip, scales);
        strip += Strip<Tiles>::code_bytes(width);
        scales += width / kSubBlock * Tiles::kSubScaleBytes;
    };
    for (size_t at = 0; at < columns.count; at += kSpan) pack(columns.first + at, columns.count - at < kSpan ? columns.count - at : kSpan);
    if (columns.part_count > 0) pack(columns.part, columns.part_count);
}

}  // namespace
}  // namespace moespan
