#include "layers/parts.h"

#include <algorithm>
#include <cstring>

#include "layers/product.h"

namespace moespan {
namespace {

constexpr size_t kGroup = 32;  // columns that share a scale of the activations

// Whole blocks for each node, the first ones having one more where it does not come out even.
Columns whole_blocks(size_t block, size_t width, size_t node, size_t nodes) {
    const size_t blocks = ceil_div(width, block);
    const auto begin = [&](size_t k) { return std::min(width, ceil_div(blocks * k, nodes) * block); };
    return {begin(node), begin(node + 1) - begin(node), 0, 0};
}

// As many whole blocks for each node, and a part of one of those that are left over: each of them is cut for as many nodes as it takes, more or less.
Columns with_part(size_t block, size_t width, size_t node, size_t nodes) {
    const size_t each = width / block / nodes, over = width / block % nodes;
    Columns slice{node * each * block, each * block, 0, 0};
    if (over == 0) return slice;
    const size_t cut = node * over / nodes, first = ceil_div(cut * nodes, over), sharers = ceil_div((cut + 1) * nodes, over) - first;
    const auto begin = [&](size_t k) { return ceil_div(block / kGroup * k, sharers) * kGroup; };
    slice.part = (nodes * each + cut) * block + begin(node - first);
    slice.part_count = begin(node - first + 1) - begin(node - first);
    return slice;
}

// Where a row is among a slice's; SIZE_MAX for one that it has not.
size_t place_in(const Columns& slice, size_t row) {
    if (row >= slice.first && row < slice.first + slice.count) return row - slice.first;
    if (row >= slice.part && row < slice.part + slice.part_count) return slice.count + row - slice.part;
    return SIZE_MAX;
}

// Rows in blocks, as they are; types that stay in row order have no slice with a part.
void copy_rows(const FormatKernels& format, const uint8_t* rows, size_t row_bytes, size_t count, const Columns& columns, uint8_t* to) {
    const size_t first = columns.first / format.block_values * format.block_bytes, bytes = columns.count / format.block_values * format.block_bytes;
    for (size_t row = 0; row < count; ++row) std::memcpy(to + row * bytes, rows + row * row_bytes + first, bytes);
}

void pack_strip(const KernelTable& kernels, const Matrix& rows, const Part& part, size_t strip) {
    const size_t per_matrix = ceil_div(rows.rows, kStripRows), matrix = strip / per_matrix, row = strip % per_matrix * kStripRows;
    const size_t to_row = part.cut == Cut::kRows ? place_in(part.slice, row) : row, count = std::min(kStripRows, rows.rows - row);
    if (to_row == SIZE_MAX || part.bytes() == 0) return;
    const FormatKernels& format = format_of(kernels, rows);
    const Columns columns = part.cut == Cut::kColumns ? part.slice : Columns{0, rows.cols, 0, 0};
    const uint8_t* from = rows.data + matrix * rows.bytes() + row * rows.row_bytes;
    uint8_t* to = part.memory + matrix * part.matrix.bytes();
    if (part.matrix.in_tiles) {
        format.tiles.pack(from, rows.row_bytes, count, columns, to + to_row / kStripRows * part.matrix.row_bytes);
    } else {
        copy_rows(format, from, rows.row_bytes, count, columns, to + to_row * part.matrix.row_bytes);
    }
}

}  // namespace

std::vector<Columns> slices(const FormatKernels& down, size_t width, size_t nodes) {
    const size_t block = std::max(down.block_values, kGroup);
    const bool cut = block > kGroup && down.tiles.pack != nullptr;
    std::vector<Columns> all;
    for (size_t node = 0; node < nodes; ++node) all.push_back(cut ? with_part(block, width, node, nodes) : whole_blocks(block, width, node, nodes));
    return all;
}

Part part_of(const KernelTable& kernels, const Matrix& rows, Cut cut, const Columns& slice) {
    const FormatKernels& format = format_of(kernels, rows);
    Part part{cut, slice, rows};
    Matrix& matrix = part.matrix;
    if (cut == Cut::kRows) matrix.rows = slice.count + slice.part_count;
    if (cut == Cut::kColumns) matrix.cols = slice.count + slice.part_count;
    matrix.in_tiles = format.tiles.pack != nullptr;
    matrix.row_bytes = matrix.in_tiles ? format.tiles.strip_bytes(matrix.cols) : matrix.cols / format.block_values * format.block_bytes;
    matrix.data = nullptr;
    return part;
}

void pack_parts(Pool& pool, const Matrix& rows, const std::vector<Part>& parts, size_t first, size_t last) {
    const KernelTable& kernels = pool.kernels();
    if (parts.size() == 1) return pool.each(last - first, [&](size_t i, uint8_t*) { pack_strip(kernels, rows, parts[0], first + i); });
    const std::vector<size_t> counts(parts.size(), last - first);
    pool.each_at_home(counts.data(), [&](size_t i, const Seat& seat) { pack_strip(kernels, rows, parts[seat.node], first + i); });
}

}  // namespace moespan
