// The Python-side Matrix.
#pragma once

#include <string>

#include "bindings/bindings.h"
#include "layers/linear.h"

namespace moespan {

// A matrix and the Python buffer that it borrows: an mmap's memoryview, mostly.
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
    ~PyMatrix() { PyBuffer_Release(&buffer_); }
    PyMatrix(const PyMatrix&) = delete;
    PyMatrix& operator=(const PyMatrix&) = delete;

    const Matrix& get() const { return matrix_; }

  private:
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
};

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
