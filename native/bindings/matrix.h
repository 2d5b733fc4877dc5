// The Python-side Matrix.
#pragma once

#include <string>

#include "bindings/bindings.h"
#include "layers/tiles.h"
#include "pool/pages.h"

namespace moespan {

// A matrix and the Python buffer that it borrows, an mmap's memoryview mostly, until it is packed: then it has memory of its own, in tile order.
class PyMatrix {
  public:
    PyMatrix(uint32_t type_id, int64_t rows, int64_t cols, const py::object& data, int64_t count) {
        const FormatKernels* format = find_format(type_id);
        require(format != nullptr, "GGUF type id ", type_id, " is not supported");
        matrix_ = {type_id, positive(rows, "rows"), positive(cols, "cols"), 0, nullptr, positive(count, "count")};
        require(matrix_.cols % format->block_values == 0, "cols is ", cols, ", but type ", type_id, " has blocks of ", format->block_values, " values");
        matrix_.row_bytes = matrix_.cols / format->block_values * format->block_bytes;
        require(matrix_.cols <= SIZE_MAX / 64 && matrix_.rows <= SIZE_MAX / 2 / matrix_.row_bytes / matrix_.count, shape(), " is too large");

        if (PyObject_GetBuffer(data.ptr(), &buffer_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
        matrix_.data = static_cast<const uint8_t*>(buffer_.buf);
        const auto bytes = static_cast<size_t>(buffer_.len);
        const size_t needed = matrix_.count * matrix_.rows * matrix_.row_bytes;
        if (bytes != needed) {
            PyBuffer_Release(&buffer_);
            require(false, shape(), " of type ", type_id, matrix_.count == 1 ? " has " : " have ", needed, " bytes, not ", bytes);
        }
    }
    ~PyMatrix() { PyBuffer_Release(&buffer_); }  // which does nothing the second time
    PyMatrix(const PyMatrix&) = delete;
    PyMatrix& operator=(const PyMatrix&) = delete;

    const Matrix& get() const { return matrix_; }

    // Strips that are still to be packed, all matrices together; 0 for a type without tile order.
    size_t strips_left() const {
        const bool never = matrix_.in_tiles || find_format(matrix_.type_id)->tiles.pack == nullptr;
        return never ? 0 : matrix_.count * strips_each() - packed_;
    }
    // Where in the buffer the next strip's rows begin.
    size_t next_byte() const { return packed_ / strips_each() * matrix_.bytes() + packed_ % strips_each() * kStripRows * matrix_.row_bytes; }

    // Packs the next strips. After the last one the matrix is in tile order and the buffer is let go.
    void pack(PyPool& pool, int64_t strips) {
        const size_t last = packed_ + positive(strips, "strips");
        require(last <= packed_ + strips_left(), strips, " strips to pack, but ", strips_left(), " are left");
        Matrix tiles = tile_layout(pool.get().kernels(), matrix_);
        if (packed_ == 0) tiles_ = Pages(tiles.count * tiles.bytes());
        {
            py::gil_scoped_release release;
            pack_strips(pool.get(), matrix_, tiles_.data(), packed_, last);
        }
        packed_ = last;
        if (strips_left() > 0) return;
        tiles.data = tiles_.data();
        matrix_ = tiles;
        PyBuffer_Release(&buffer_);
    }

  private:
    size_t strips_each() const { return (matrix_.rows + kStripRows - 1) / kStripRows; }

    std::string shape() const {
        const std::string size = "[" + std::to_string(matrix_.rows) + ", " + std::to_string(matrix_.cols) + "] matri";
        return matrix_.count == 1 ? "a " + size + "x" : std::to_string(matrix_.count) + " " + size + "ces";
    }

    static const FormatKernels* find_format(uint32_t type_id) {
        for (size_t i = 0; i < kScalarKernels.format_count; ++i) {
            if (kScalarKernels.formats[i].type_id == type_id) return &kScalarKernels.formats[i];
        }
        return nullptr;
    }

    Matrix matrix_;
    Py_buffer buffer_;
    Pages tiles_;
    size_t packed_ = 0;  // strips
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
