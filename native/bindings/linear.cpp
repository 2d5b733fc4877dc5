// Matrix, linear, ffn and dequantize_rows.
#include <array>
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/matrix.h"
#include "layers/ffn.h"
#include "layers/linear.h"
#include "layers/norm.h"

namespace moespan {
namespace {

InputNorm input_norm(uintptr_t weight, float eps) { return {weight == 0 ? nullptr : address<const float>(weight, "norm"), eps}; }

// Arguments of linear, checked.
struct LinearCall {
    std::array<Matrix, kMaxMatrices> matrices;
    std::array<float*, kMaxMatrices> outs;
    std::array<const float*, kMaxMatrices> biases;
    size_t count, n;
    const float* x;
    InputNorm norm;
    bool accumulate;

    void run(Pool& pool) const {
        const float* input = normed(pool, norm, x, n, matrices[0].cols);
        for (size_t i = 0; i < count; ++i) {
            if (biases[i] != nullptr) repeat_row(biases[i], matrices[i].rows, outs[i], n);
        }
        linear(pool, matrices.data(), count, input, n, outs.data(), accumulate || biases[0] != nullptr);
    }
};

void take_biases(LinearCall& call, const py::sequence& biases) {
    require(biases.size() == 0 || biases.size() == call.count, call.count, " matrices, but ", biases.size(), " biases");
    require(biases.size() == 0 || !call.accumulate, "what is accumulated has no bias");
    for (size_t i = 0; i < biases.size(); ++i) call.biases[i] = address<const float>(biases[i].cast<uintptr_t>(), "bias");
}

void py_linear(PyPool& pool, const py::sequence& matrices, uintptr_t x, int64_t n, const py::sequence& outs, bool accumulate, uintptr_t norm, float eps,
               const py::sequence& biases) {
    LinearCall call{};
    call.count = matrices.size();
    require(call.count >= 1 && call.count <= kMaxMatrices, "linear takes 1 to ", kMaxMatrices, " matrices, not ", call.count);
    require(outs.size() == call.count, call.count, " matrices, but ", outs.size(), " outputs");
    for (size_t i = 0; i < call.count; ++i) {
        const Matrix& matrix = call.matrices[i] = matrices[i].cast<const PyMatrix&>().get();
        require_single(matrix, "each of linear's");
        require(matrix.cols == call.matrices[0].cols, "matrices of ", call.matrices[0].cols, " and ", matrix.cols, " columns cannot share x");
        call.outs[i] = address<float>(outs[i].cast<uintptr_t>(), "out");
    }
    call.x = address<const float>(x, "x");
    call.n = positive(n, "n");
    call.norm = input_norm(norm, eps);
    call.accumulate = accumulate;
    take_biases(call, biases);
    pool.perform([call](Pool& native, const Place&) { call.run(native); });
}

void py_ffn(PyPool& pool, const PyMatrix& gate, const PyMatrix& up, const PyMatrix& down, uintptr_t x, int64_t n, uintptr_t out, bool accumulate,
            uintptr_t norm, float eps, uintptr_t scales) {
    const Matrix g = gate.get(), u = up.get(), d = down.get();
    require_gated(g, u, d);
    require_single(g, "gate");
    const auto* input = address<const float>(x, "x");
    auto* output = address<float>(out, "out");
    const size_t tokens = positive(n, "n");
    const InputNorm factors = input_norm(norm, eps);
    const float* token_scales = scales == 0 ? nullptr : address<const float>(scales, "scales");
    pool.perform([=](Pool& native, const Place&) {
        ffn(native, g, u, d, normed(native, factors, input, tokens, g.cols), tokens, token_scales, output, accumulate);
    });
}

void py_dequantize_rows(PyPool& pool, const PyMatrix& matrix, uintptr_t row_ids, int64_t n, uintptr_t out) {
    const Matrix table = matrix.get();
    require_single(table, "what rows are taken from");
    require_rows(table);
    const auto* ids = address<const int64_t>(row_ids, "row_ids");
    const size_t count = positive(n, "n");
    auto* output = address<float>(out, "out");
    pool.perform([=](Pool& native, const Place&) {
        const auto rows = static_cast<int64_t>(table.rows);
        for (size_t i = 0; i < count; ++i) require(ids[i] >= 0 && ids[i] < rows, "row ", ids[i], " of a matrix of ", rows, " rows");
        dequantize_rows(native, table, ids, count, output);
    });
}

// Of each node, where the matrix was spread: address (0 before there is memory), bytes, rows and columns.
std::vector<std::tuple<uintptr_t, size_t, size_t, size_t>> parts_of(const PyMatrix& matrix) {
    std::vector<std::tuple<uintptr_t, size_t, size_t, size_t>> parts;
    if (!matrix.is_spread()) return parts;
    for (const Part& part : matrix.parts()) {
        parts.emplace_back(reinterpret_cast<uintptr_t>(part.memory), part.bytes(), part.matrix.rows, part.matrix.cols);
    }
    return parts;
}

}  // namespace

void bind_linear(py::module_& module, py::class_<PyPool>& pool) {
    py::class_<PyMatrix>(module, "Matrix")
        .def(py::init<uint32_t, int64_t, int64_t, const py::object&, int64_t>(), py::arg("type_id"), py::arg("rows"), py::arg("cols"), py::arg("data"),
             py::arg("count") = 1)
        .def_property_readonly("type_id", [](const PyMatrix& m) { return m.shape().type_id; })
        .def_property_readonly("rows", [](const PyMatrix& m) { return m.shape().rows; })
        .def_property_readonly("cols", [](const PyMatrix& m) { return m.shape().cols; })
        .def_property_readonly("count", [](const PyMatrix& m) { return m.shape().count; })
        .def_property_readonly("nbytes", &PyMatrix::bytes)
        .def_property_readonly("address", &PyMatrix::address)
        .def_property_readonly("in_tiles", &PyMatrix::in_tiles)
        .def_property_readonly("strips_left", &PyMatrix::strips_left)
        .def_property_readonly("next_byte", &PyMatrix::next_byte)
        .def_property_readonly("parts", &parts_of)
        .def("pack", &PyMatrix::pack, py::arg("pool"), py::arg("strips"));
    pool.def("linear", &py_linear, py::arg("matrices"), py::arg("x"), py::arg("n"), py::arg("outs"), py::arg("accumulate"), py::arg("norm") = 0, py::arg("eps") = 0.0f,
             py::arg("biases") = py::tuple())
        .def("ffn", &py_ffn, py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("x"), py::arg("n"), py::arg("out"), py::arg("accumulate"),
             py::arg("norm") = 0, py::arg("eps") = 0.0f, py::arg("scales") = 0)
        .def("dequantize_rows", &py_dequantize_rows, py::arg("matrix"), py::arg("row_ids"), py::arg("n"), py::arg("out"));
}

}  // namespace moespan
