// The Python-side Program.
#pragma once

#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace moespan {

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

}  // namespace moespan
