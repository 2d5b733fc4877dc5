// What the binding files share: the Python-side Pool and the argument checks. No arithmetic on data here: that is in layers/.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "layers/program.h"
#include "pool/pool.h"

namespace moespan {

namespace py = pybind11;

// A sentence with numbers, as Python's ValueError (pybind11 turns std::invalid_argument into it).
template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::string text;
    const auto add = [&text](const auto& part) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
            text += std::to_string(part);
        } else {
            text += part;
        }
    };
    (add(parts), ...);
    throw std::invalid_argument(text);
}

// A float array whose address Python passed; nullptr is refused where there is something to read or write.
template <class T>
T* address(uintptr_t value, const char* name) {
    require(value != 0, name, " is a null address");
    require(value % alignof(T) == 0, name, " is not aligned to ", alignof(T), " bytes");
    return reinterpret_cast<T*>(value);
}

inline size_t positive(int64_t value, const char* name) {
    require(value > 0, name, " is ", value, ", but must be at least 1");
    return static_cast<size_t>(value);
}

// The pool as Python holds it: close() may come before the last reference goes.
class PyPool {
  public:
    PyPool(const std::vector<int>& cpus, const std::string& isa, int spin_us, const std::vector<size_t>& nodes);

    Pool& get() const {
        require(pool_ != nullptr, "the pool is closed");
        return *pool_;
    }
    // Whoever asks for counters meanwhile holds the GIL, so the pool is gone for them before it is.
    void close() {
        std::unique_ptr<Pool> closing = std::move(pool_);
        py::gil_scoped_release release;
        closing.reset();
    }

    // Runs an operation without the GIL; or, while a program is recorded, adds it there and leaves all data as it is.
    template <class Call>
    void perform(const Call& operation, const Place& place = {}) {
        Pool& native = get();
        if (recorded_ != nullptr) return recorded_->add(operation);
        py::gil_scoped_release release;
        operation(native, place);
    }

    // Where operations go from now on; null: they are run.
    void record_to(Program* program) { recorded_ = program; }

  private:
    std::unique_ptr<Pool> pool_;
    Program* recorded_ = nullptr;
};

void bind_linear(py::module_& module, py::class_<PyPool>& pool);  // linear.cpp: Matrix, linear, ffn, dequantize_rows
void bind_experts(py::class_<PyPool>& pool);                     // experts.cpp: experts, route, sigmoid
void bind_attention(py::class_<PyPool>& pool);                   // attention.cpp: rms_norm, rope, store_kv, attention, attend
void bind_latent(py::class_<PyPool>& pool);                      // latent.cpp: linear_heads, attend_latent
void bind_bench(py::class_<PyPool>& pool);                       // bench.cpp: read_sweep, peak_ops
void bind_program(py::module_& module, py::class_<PyPool>& pool); // program.cpp: Program, record
void bind_handoff(py::module_& module);                           // handoff.cpp: Handoff

}  // namespace moespan
