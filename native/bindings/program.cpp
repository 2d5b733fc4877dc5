// Program, and the pool's record.
#include "layers/program.h"

#include "bindings/bindings.h"
#include "bindings/cache.h"

namespace moespan {
namespace {

// A program and the place that its next run is for.
class PyProgram {
  public:
    Program& get() { return program_; }
    size_t size() const { return program_.size(); }

    void set_pages(const py::sequence& pages) {
        std::vector<int32_t> taken;
        for (size_t i = 0; i < pages.size(); ++i) taken.push_back(pages[i].cast<int32_t>());
        for (int32_t page : taken) require(page >= 0, "a page is ", page, ", but must not be negative");
        pages_ = std::move(taken);
    }

    void run(PyPool& pool, int64_t start) {
        require(start >= 0, "start is ", start, ", but must not be negative");
        pool.perform([this](Pool& native, const Place& place) { program_.run(native, place); }, {static_cast<size_t>(start), pages_.data(), pages_.size()});
    }

  private:
    Program program_;
    std::vector<int32_t> pages_;
};

}  // namespace

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
