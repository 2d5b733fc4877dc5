// The Python-side Matrix.
#pragma once

#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "layers/parts.h"
#include "pool/pages.h"

namespace moespan {

// A matrix and the Python buffer that it borrows, an mmap's memoryview mostly, until it is packed: then it has memory of its own, in tile order where its
// type has one. Where it was spread before, that is one part for each of the pool's nodes.
class PyMatrix {
  public:
    PyMatrix(uint32_t type_id, int64_t rows, int64_t cols, const py::object& data, int64_t count);
    ~PyMatrix() { PyBuffer_Release(&buffer_); }  // which does nothing the second time
    PyMatrix(const PyMatrix&) = delete;
    PyMatrix& operator=(const PyMatrix&) = delete;

    // For reading: refuses what lies in parts.
    const Matrix& get() const;
    // Its type and shape.
    const Matrix& shape() const { return matrix_; }
    const FormatKernels& format() const { return *format_; }
    size_t bytes() const;  // in the order that it is in
    uintptr_t address() const { return in_parts() ? 0 : reinterpret_cast<uintptr_t>(matrix_.data); }
    bool in_tiles() const { return packed_all_ && format_->tiles.pack != nullptr; }

    // Strips that are still to be packed, all matrices together; 0 for what stays as it is.
    size_t strips_left() const;
    // Where in the buffer the next strip's rows begin.
    size_t next_byte() const { return packed_ / strips_each() * matrix_.bytes() + packed_ % strips_each() * kStripRows * matrix_.row_bytes; }
    // Packs the next strips. After the last one the buffer is let go.
    void pack(PyPool& pool, int64_t strips);

    // Before it is packed: the part of each node, by its slice, and whose memory its pages come from.
    void spread(const KernelTable& kernels, Cut cut, const std::vector<Columns>& slices, const std::vector<int>& memory);
    bool is_spread() const { return spread_; }
    bool in_parts() const { return spread_ && packed_all_; }
    const std::vector<Part>& parts() const { return parts_; }

  private:
    size_t strips_each() const { return (matrix_.rows + kStripRows - 1) / kStripRows; }
    void allocate(const KernelTable& kernels);
    void finish();
    std::string words() const;

    Matrix matrix_;
    const FormatKernels* format_;
    Py_buffer buffer_;
    std::vector<Part> parts_;  // once packing begins, or it was spread
    std::vector<Pages> pages_;
    std::vector<int> memory_;  // the kernel's number of each part's node, where it was spread
    size_t packed_ = 0;        // strips
    bool spread_ = false, packed_all_ = false;
};

inline void require_rows(const Matrix& matrix) { require(!matrix.in_tiles, "a matrix in tile order has no rows to hand out"); }

inline void require_single(const Matrix& matrix, const char* name) {
    require(matrix.count == 1, name, " must be a single matrix, not ", matrix.count, " of them");
}

// The shapes of a gated feed-forward network, or of as many as the matrices hold.
inline void require_gated(const Matrix& gate, const Matrix& up, const Matrix& down) {
    require(gate.rows == up.rows && gate.cols == up.cols, "gate is [", gate.rows, ", ", gate.cols, "], but up is [", up.rows, ", ", up.cols, "]");
    require(down.cols == gate.rows, "gate has ", gate.rows, " rows, but down has ", down.cols, " columns");
    require(gate.count == up.count && gate.count == down.count, "gate, up and down hold ", gate.count, ", ", up.count, " and ", down.count, " experts");
}

}  // namespace moespan
