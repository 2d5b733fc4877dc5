#include "layers/tiles.h"

#include <algorithm>

#include "layers/product.h"

namespace moespan {

Matrix tile_layout(const KernelTable& kernels, const Matrix& rows) {
    Matrix tiles = rows;
    tiles.in_tiles = true;
    tiles.row_bytes = format_of(kernels, rows).tiles.strip_bytes(rows.cols);
    tiles.data = nullptr;
    return tiles;
}

void pack_strips(Pool& pool, const Matrix& rows, uint8_t* tiles, size_t first, size_t last) {
    const TileKernels& kernels = format_of(pool.kernels(), rows).tiles;
    const size_t strip_bytes = kernels.strip_bytes(rows.cols), per_matrix = ceil_div(rows.rows, kStripRows);
    pool.each(last - first, [&](size_t i, uint8_t*) {
        const size_t strip = first + i, matrix = strip / per_matrix, row = strip % per_matrix * kStripRows;
        const uint8_t* source = rows.data + matrix * rows.bytes() + row * rows.row_bytes;
        kernels.pack(source, rows.row_bytes, std::min(kStripRows, rows.rows - row), rows.cols, tiles + strip * strip_bytes);
    });
}

}  // namespace moespan
