// Program, and the pool's record.
#include "bindings/program.h"

namespace moespan {

void bind_program(py::module_& module, py::class_<PyPool>& pool) {
    py::class_<PyProgram>(module, "Program")
        .def(py::init<>())
        .def("__len__", &PyProgram::size)
        .def("set_pages", &PyProgram::set_pages, py::arg("pages"))
        .def("run", &PyProgram::run, py::arg("pool"), py::arg("start"));
    pool.def(
        "record", [](PyPool& p, PyProgram* program) { p.record_to(program == nullptr ? nullptr : &program->get()); }, py::arg("program").none(true));
}

}  // namespace moespan
