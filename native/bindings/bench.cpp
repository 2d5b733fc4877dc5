// read_sweep and peak_ops.
#include "bench/limits.h"
#include "bindings/bindings.h"

namespace moespan {
namespace {

double py_read_sweep(PyPool& pool, uintptr_t data, int64_t bytes) {
    Pool& native = pool.get();
    const auto* values = address<const float>(data, "data");
    const size_t count = positive(bytes, "bytes");
    require(count % kSweepChunk == 0, "bytes is ", bytes, ", but must be a multiple of ", kSweepChunk);
    py::gil_scoped_release release;
    return read_sweep(native, values, count);
}

py::dict py_peak_ops(PyPool& pool) {
    Pool& native = pool.get();
    py::dict rates;
    for (size_t i = 0; i < native.kernels().peak_count; ++i) {
        const PeakLoop& loop = native.kernels().peaks[i];
        double rate;
        {
            py::gil_scoped_release release;
            rate = peak_rate(native, loop);
        }
        rates[loop.name] = rate;
    }
    return rates;
}

}  // namespace

void bind_bench(py::class_<PyPool>& pool) {
    pool.def("read_sweep", &py_read_sweep, py::arg("data"), py::arg("bytes")).def("peak_ops", &py_peak_ops);
}

}  // namespace moespan
