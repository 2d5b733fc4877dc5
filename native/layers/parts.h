// How the experts of a layer are spread over nodes of memory, each with workers of its own: a node has a slice of every expert's intermediate dimension
// (rows of gate and up, columns of down), or a copy of everything.
#pragma once

#include <vector>

#include "layers/linear.h"

namespace moespan {

// The slices of `width` intermediate columns, one for each node, as even as `down`'s type lets them be; all begin and end at multiples of 32.
//
// A block of 32 is never cut. A super-block of 256 is, where the type has a tile order: its scales are then in several slices. A slice holds whole
// super-blocks and at most one part of another one, behind them, so that it reads as a matrix of its own. Types that stay in row order are cut between blocks.
// Where there are fewer blocks than nodes, a slice may be empty.
std::vector<Columns> slices(const FormatKernels& down, size_t width, size_t nodes);

// What a part has of its matrix: all of it, or those rows or columns that are a slice.
enum class Cut { kNone, kRows, kColumns };

// A matrix, or one node's part of it.
struct Part {
    Cut cut;
    Columns slice;
    Matrix matrix;              // as it lies there: in tile order, if its type has one; data is null until it is packed
    uint8_t* memory = nullptr;  // matrix.count * matrix.bytes(), which may be 0

    size_t bytes() const { return matrix.count * matrix.bytes(); }
};

// The part of `rows`, which is in row order; without memory yet.
Part part_of(const KernelTable& kernels, const Matrix& rows, Cut cut, const Columns& slice);

// The strips first .. last - 1 of `rows` (16 rows each, counted through all of its matrices) to where each part has them. Several parts are those of
// the pool's nodes, and each is written by its node's threads.
void pack_parts(Pool& pool, const Matrix& rows, const std::vector<Part>& parts, size_t first, size_t last);

}  // namespace moespan
