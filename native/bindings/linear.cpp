// Matrix, linear, ffn and dequantize_rows.
#include "bindings/bindings.h"
#include "bindings/matrix.h"
#include "layers/ffn.h"
#include "layers/linear.h"
#include "layers/norm.h"

namespace moespan {
namespace {

InputNorm input_norm(uintptr_t weight, float eps) { return {weight == 0 ? nullptr : address<const float>(weight, "norm"), eps}; }

void py_linear(PyPool& pool, const py::sequence& matrices, uintptr_t x, int64_t n, const py::sequence& outs, bool accumulate, uintptr_t norm, float eps) {
    const size_t count = matrices.size();
    require(count >= 1 && count <= kMaxMatrices, "linear takes 1 to ", kMaxMatrices, " matrices, not ", count);
    require(outs.size() == count, count, " matrices, but ", outs.size(), " outputs");
    Matrix taken[kMaxMatrices];
    float* addresses[kMaxMatrices];
    for (size_t i = 0; i < count; ++i) {
        taken[i] = matrices[i].cast<const PyMatrix&>().get();
        require_single(taken[i], "each of linear's");
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
            uintptr_t norm, float eps, uintptr_t scales) {
    const Matrix &g = gate.get(), &u = up.get(), &d = down.get();
    require_gated(g, u, d);
    require_single(g, "gate");
    Pool& native = pool.get();
    const auto* input = address<const float>(x, "x");
    auto* output = address<float>(out, "out");
    const size_t tokens = positive(n, "n");
    const InputNorm factors = input_norm(norm, eps);
    const float* token_scales = scales == 0 ? nullptr : address<const float>(scales, "scales");
    py::gil_scoped_release release;
    ffn(native, g, u, d, normed(native, factors, input, tokens, g.cols), tokens, token_scales, output, accumulate);
}

void py_dequantize_rows(PyPool& pool, const PyMatrix& matrix, uintptr_t row_ids, int64_t n, uintptr_t out) {
    require_single(matrix.get(), "what rows are taken from");
    require_rows(matrix.get());
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
        .def(py::init<uint32_t, int64_t, int64_t, const py::object&, int64_t>(), py::arg("type_id"), py::arg("rows"), py::arg("cols"), py::arg("data"),
             py::arg("count") = 1)
        .def_property_readonly("type_id", [](const PyMatrix& m) { return m.get().type_id; })
        .def_property_readonly("rows", [](const PyMatrix& m) { return m.get().rows; })
        .def_property_readonly("cols", [](const PyMatrix& m) { return m.get().cols; })
        .def_property_readonly("count", [](const PyMatrix& m) { return m.get().count; })
        .def_property_readonly("nbytes", [](const PyMatrix& m) { return m.get().count * m.get().bytes(); })
        .def_property_readonly("in_tiles", [](const PyMatrix& m) { return m.get().in_tiles; })
        .def_property_readonly("strips_left", &PyMatrix::strips_left)
        .def_property_readonly("next_byte", &PyMatrix::next_byte)
        .def("pack", &PyMatrix::pack, py::arg("pool"), py::arg("strips"));
    pool.def("linear", &py_linear, py::arg("matrices"), py::arg("x"), py::arg("n"), py::arg("outs"), py::arg("accumulate"), py::arg("norm") = 0, py::arg("eps") = 0.0f)
        .def("ffn", &py_ffn, py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("x"), py::arg("n"), py::arg("out"), py::arg("accumulate"),
             py::arg("norm") = 0, py::arg("eps") = 0.0f, py::arg("scales") = 0)
        .def("dequantize_rows", &py_dequantize_rows, py::arg("matrix"), py::arg("row_ids"), py::arg("n"), py::arg("out"));
}

}  // namespace moespan
