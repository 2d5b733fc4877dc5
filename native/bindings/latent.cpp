// linear_heads, and attend_latent, which is the whole of multi-head latent attention behind its projections.
#include "bindings/bindings.h"
#include "bindings/cache.h"
#include "bindings/matrix.h"
#include "layers/heads.h"
#include "layers/latent.h"

namespace moespan {
namespace {

void py_linear_heads(PyPool& pool, const PyMatrix& matrix, uintptr_t x, int64_t n, int64_t width, uintptr_t out) {
    const Matrix& m = matrix.get();
    const size_t stride = positive(width, "width"), tokens = positive(n, "n");
    require(stride >= m.cols, "width is ", width, ", but the matrices have ", m.cols, " columns");
    const HeadRows<const float> from{address<const float>(x, "x"), m.count * stride, stride};
    const HeadRows<float> to{address<float>(out, "out"), m.count * m.rows, m.rows};
    Pool& native = pool.get();
    py::gil_scoped_release release;
    linear_heads(native, m, from, tokens, to);
}

PagedKv latent_cache(Pool& pool, const LatentCall& call, uintptr_t cache, bool half, int64_t page_size, const py::sequence& pages) {
    PagedKv kv{};
    kv.half = half;
    kv.kv_heads = 1;
    kv.value_dim = call.k_b.rows;
    kv.head_dim = kv.value_dim + call.rotation.rot_dim;
    kv.page_size = positive(page_size, "page_size");
    kv.pages = copy_pages(pool, pages, kv.page_size, call.start + call.n);
    kv.k = half ? static_cast<void*>(address<uint16_t>(cache, "cache")) : address<float>(cache, "cache");
    return kv;
}

void py_attend_latent(PyPool& pool, uintptr_t q, uintptr_t latent, int64_t n, uintptr_t norm, float eps, uintptr_t table, int64_t rot_dim, bool interleaved,
                      uintptr_t cache, bool half, int64_t page_size, const py::sequence& pages, int64_t start, const PyMatrix& k_b, const PyMatrix& v_b,
                      float scale, uintptr_t out) {
    const Matrix &k = k_b.get(), &v = v_b.get();
    require(k.count == v.count, "k_b has ", k.count, " heads, but v_b has ", v.count);
    require(k.rows == v.cols, "k_b has ", k.rows, " rows, but v_b has ", v.cols, " columns");
    require(start >= 0, "start is ", start, ", but must not be negative");
    Pool& native = pool.get();
    LatentCall call{};
    call.q = address<float>(q, "q");
    call.latents = address<float>(latent, "latent");
    call.out = address<float>(out, "out");
    call.n = positive(n, "n");
    call.start = static_cast<size_t>(start);
    call.scale = scale;
    call.rotation = checked_rotation(table, rot_dim, interleaved, static_cast<size_t>(rot_dim));
    call.norm = {address<const float>(norm, "norm"), eps};
    call.k_b = k;
    call.v_b = v;
    call.kv = latent_cache(native, call, cache, half, page_size, pages);
    py::gil_scoped_release release;
    attend_latent(native, call);
}

}  // namespace

void bind_latent(py::class_<PyPool>& pool) {
    using py::arg;
    pool.def("linear_heads", &py_linear_heads, arg("matrix"), arg("x"), arg("n"), arg("width"), arg("out"))
        .def("attend_latent", &py_attend_latent, arg("q"), arg("latent"), arg("n"), arg("norm"), arg("eps"), arg("table"), arg("rot_dim"), arg("interleaved"),
             arg("cache"), arg("half"), arg("page_size"), arg("pages"), arg("start"), arg("k_b"), arg("v_b"), arg("scale"), arg("out"));
}

}  // namespace moespan
