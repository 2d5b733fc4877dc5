// server._native: the surface is described in server/_native.pyi.
#include "bindings/bindings.h"
#include "isa/registry.h"
#include "pool/pages.h"

namespace moespan {

PyPool::PyPool(const std::vector<int>& cpus, const std::string& isa, int spin_us, const std::vector<size_t>& nodes) {
    require(spin_us >= 0, "spin_us is ", spin_us, ", but must not be negative");
    pool_ = std::make_unique<Pool>(cpus, kernels_for(isa), spin_us, nodes);
}

namespace {

py::dict crossovers(const Pool& pool) {
    py::dict from;
    for (size_t i = 0; i < pool.kernels().format_count; ++i) {
        const FormatKernels& format = pool.kernels().formats[i];
        if (pool.knows_crossover(format.type_id)) from[py::int_(format.type_id)] = format.tiles.gemm_from;
    }
    return from;
}

PYBIND11_MODULE(_native, module) {
    module.def("compiled_isas", &compiled_isas);
    module.def("available_isas", &available_isas);
    module.def("refused_isas", &refused_isas);
    module.def("bind_error", &bind_error, py::arg("node"));
    module.def("supported_types", [] {
        std::vector<uint32_t> ids;
        for (size_t i = 0; i < kScalarKernels.format_count; ++i) ids.push_back(kScalarKernels.formats[i].type_id);
        return ids;
    });

    py::class_<PyPool> pool(module, "Pool");
    pool.def(py::init<const std::vector<int>&, const std::string&, int, const std::vector<size_t>&>(), py::arg("cpus"), py::arg("isa"),
             py::arg("spin_us") = 50000, py::arg("nodes") = std::vector<size_t>())
        .def_property_readonly("threads", [](const PyPool& p) { return p.get().threads(); })
        .def_property_readonly("nodes", [](const PyPool& p) { return p.get().nodes(); })
        .def_property_readonly("isa", [](const PyPool& p) { return p.get().kernels().name; })
        .def_property_readonly("crossovers", [](const PyPool& p) { return crossovers(p.get()); })
        .def_property_readonly("busy_ns", [](const PyPool& p) { return p.get().busy_ns(); })
        .def_property_readonly("expert_bytes_read", [](const PyPool& p) { return p.get().bytes_read(Weights::kExperts); })
        .def_property_readonly("dense_bytes_read", [](const PyPool& p) { return p.get().bytes_read(Weights::kDense); })
        .def("pin_caller", [](const PyPool& p) { p.get().pin_caller(); })
        .def("close", &PyPool::close);
    bind_linear(module, pool);
    bind_experts(pool);
    bind_attention(pool);
    bind_latent(pool);
    bind_bench(pool);
    bind_program(module, pool);
    bind_handoff(module);
}

}  // namespace
}  // namespace moespan
