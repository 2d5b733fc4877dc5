// Matrix, linear, ffn and dequantize_rows.
#include "bindings/bindings.h"
#include "layers/ffn.h"
#include "layers/linear.h"
#include "layers/norm.h"

namespace moespan {
namespace {

// A matrix and the Python buffer that it borrows: an mmap's memoryview, mostly.
class PyMatrix {
  public:
    PyMatrix(uint32_t type_id, int64_t rows, int64_t cols, const py::object& data) {
        const FormatKernels* format = find_format(type_id);
        require(format != nullptr, "GGUF type id ", type_id, " is not supported");
        matrix_ = {type_id, positive(rows, "rows"), positive(cols, "cols"), 0, nullptr};
        require(matrix_.cols % format->block_values == 0, "cols is ", cols, ", but type ", type_id, " has blocks of ", format->block_values, " values");
        matrix_.row_bytes = matrix_.cols / format->block_values * format->block_bytes;
        require(matrix_.rows <= SIZE_MAX / 2 / matrix_.row_bytes && matrix_.cols <= SIZE_MAX / 64, "a [", rows, ", ", cols, "] matrix is too large");

        if (PyObject_GetBuffer(data.ptr(), &buffer_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
        matrix_.data = static_cast<const uint8_t*>(buffer_.buf);
        const auto bytes = static_cast<size_t>(buffer_.len);
        if (bytes != matrix_.rows * matrix_.row_bytes) {
            PyBuffer_Release(&buffer_);
            require(false, "a [", rows, ", ", cols, "] matrix of type ", type_id, " has ", matrix_.rows * matrix_.row_bytes, " bytes, not ", bytes);
        }
    }
    ~PyMatrix() { PyBuffer_Release(&buffer_); }
    PyMatrix(const PyMatrix&) = delete;
    PyMatrix& operator=(const PyMatrix&) = delete;

    const Matrix& get() const { return matrix_; }

  private:
    static const FormatKernels* find_format(uint32_t type_id) {
        for (size_t i = 0; i < kScalarKernels.format_count; ++i) {
            if (kScalarKernels.formats[i].type_id == type_id) return &kScalarKernels.formats[i];
        }
        return nullptr;
    }

    Matrix matrix_;
    Py_buffer buffer_;
};

InputNorm input_norm(uintptr_t weight, float eps) { return {weight == 0 ? nullptr : address<const float>(weight, "norm"), eps}; }

void py_linear(PyPool& pool, const py::sequence& matrices, uintptr_t x, int64_t n, const py::sequence& outs, bool accumulate, uintptr_t norm, float eps) {
    const size_t count = matrices.size();
    require(count >= 1 && count <= kMaxMatrices, "linear takes 1 to ", kMaxMatrices, " matrices, not ", count);
    require(outs.size() == count, count, " matrices, but ", outs.size(), " outputs");
    Matrix taken[kMaxMatrices];
    float* addresses[kMaxMatrices];
    for (size_t i = 0; i < count; ++i) {
        taken[i] = matrices[i].cast<const PyMatrix&>().get();
        require(taken[i].cols == taken[0].cols, "matrices of ", taken[0].cols, " and ", taken[i].cols, " columns cannot share x");
        addresses[i] = address<float>(outs[i].cast<uintptr_t>(), "out");
    }
    Pool& native = pool.get();
    const auto* input = address<const float>(x, "x");
    const size_t tokens = positive(n, "n");
    const InputNorm factors = input_norm(norm, eps);
    py::gil_scoped_release release;
    linear(native, taken, count, normed(native, factors, input, tokens, taken[0].cols), tokens, addresses, accumulate);
}

void py_ffn(PyPool& pool, const PyMatrix& gate, const PyMatrix& up, const PyMatrix& down, uintptr_t x, int64_t n, uintptr_t out, bool accumulate,
            uintptr_t norm, float eps) {
    const Matrix &g = gate.get(), &u = up.get(), &d = down.get();
    require(g.rows == u.rows && g.cols == u.cols, "gate is [", g.rows, ", ", g.cols, "], but up is [", u.rows, ", ", u.cols, "]");
    require(d.cols == g.rows, "gate has ", g.rows, " rows, but down has ", d.cols, " columns");
    Pool& native = pool.get();
    const auto* input = address<const float>(x, "x");
    auto* output = address<float>(out, "out");
    const size_t tokens = positive(n, "n");
    const InputNorm factors = input_norm(norm, eps);
    py::gil_scoped_release release;
    ffn(native, g, u, d, normed(native, factors, input, tokens, g.cols), tokens, output, accumulate);
}

void py_dequantize_rows(PyPool& pool, const PyMatrix& matrix, uintptr_t row_ids, int64_t n, uintptr_t out) {
    const auto* ids = address<const int64_t>(row_ids, "row_ids");
    const size_t count = positive(n, "n");
    const auto rows = static_cast<int64_t>(matrix.get().rows);
    for (size_t i = 0; i < count; ++i) require(ids[i] >= 0 && ids[i] < rows, "row ", ids[i], " of a matrix of ", rows, " rows");
    Pool& native = pool.get();
    auto* output = address<float>(out, "out");
    py::gil_scoped_release release;
    dequantize_rows(native, matrix.get(), ids, count, output);
}

}  // namespace

void bind_linear(py::module_& module, py::class_<PyPool>& pool) {
    py::class_<PyMatrix>(module, "Matrix")
        .def(py::init<uint32_t, int64_t, int64_t, const py::object&>(), py::arg("type_id"), py::arg("rows"), py::arg("cols"), py::arg("data"))
        .def_property_readonly("type_id", [](const PyMatrix& m) { return m.get().type_id; })
        .def_property_readonly("rows", [](const PyMatrix& m) { return m.get().rows; })
        .def_property_readonly("cols", [](const PyMatrix& m) { return m.get().cols; });
    pool.def("linear", &py_linear, py::arg("matrices"), py::arg("x"), py::arg("n"), py::arg("outs"), py::arg("accumulate"), py::arg("norm") = 0, py::arg("eps") = 0.0f)
        .def("ffn", &py_ffn, py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("x"), py::arg("n"), py::arg("out"), py::arg("accumulate"),
             py::arg("norm") = 0, py::arg("eps") = 0.0f)
        .def("dequantize_rows", &py_dequantize_rows, py::arg("matrix"), py::arg("row_ids"), py::arg("n"), py::arg("out"));
}

}  // namespace moespan
