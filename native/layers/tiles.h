// From row order to tile order (kernels/tiles-inl.h), on the pool.
#pragma once

#include "layers/linear.h"

namespace moespan {

// `rows` as it would lie in tile order, without memory yet; its type must have one (FormatKernels::tiles).
Matrix tile_layout(const KernelTable& kernels, const Matrix& rows);

// The strips first .. last - 1, counted through all of the matrices, of `rows` to `tiles` at the same place.
void pack_strips(Pool& pool, const Matrix& rows, uint8_t* tiles, size_t first, size_t last);

}  // namespace moespan
