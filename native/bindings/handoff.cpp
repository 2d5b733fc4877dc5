// Handoff: flags between a GPU's graph and the pool.
#include "layers/handoff.h"

#include "bindings/bindings.h"
#include "bindings/program.h"

namespace moespan {
namespace {

class PyHandoff {
  public:
    PyHandoff(uintptr_t asked, uintptr_t answered, int64_t count, int64_t timeout_ms)
        : handoff_(address<uint32_t>(asked, "asked"), address<uint32_t>(answered, "answered"), positive(count, "count"),
                   static_cast<int64_t>(positive(timeout_ms, "timeout_ms")) * 1000000) {}

    void reset() { handoff_.reset(); }
    void fail() { handoff_.fail(); }

    void serve(PyPool& pool, PyProgram& program) {
        require(program.size() == handoff_.count(), "the program has ", program.size(), " operations, but there are ", handoff_.count(), " flags");
        Pool& native = pool.get();
        py::gil_scoped_release release;
        handoff_.serve(native, program.get(), {});
    }

    std::vector<std::pair<int64_t, int64_t>> turns() const {
        std::vector<std::pair<int64_t, int64_t>> turns;
        for (const Handoff::Turn& turn : handoff_.turns()) turns.emplace_back(turn.asked, turn.answered);
        return turns;
    }

  private:
    Handoff handoff_;
};

}  // namespace

void bind_handoff(py::module_& module) {
    py::class_<PyHandoff>(module, "Handoff")
        .def(py::init<uintptr_t, uintptr_t, int64_t, int64_t>(), py::arg("asked"), py::arg("answered"), py::arg("count"), py::arg("timeout_ms"))
        .def("reset", &PyHandoff::reset)
        .def("serve", &PyHandoff::serve, py::arg("pool"), py::arg("program"))
        .def("fail", &PyHandoff::fail)
        .def_property_readonly("turns", &PyHandoff::turns);
}

}  // namespace moespan
