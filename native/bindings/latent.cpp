// linear_heads, and attend_latent, which is the whole of multi-head latent attention behind its projections.
#include "bindings/bindings.h"
#include "bindings/cache.h"
#include "bindings/matrix.h"
#include "layers/heads.h"
#include "layers/latent.h"

namespace moespan {
namespace {

void py_linear_heads(PyPool& pool, const PyMatrix& matrix, uintptr_t x, int64_t n, int64_t width, uintptr_t out) {
    const Matrix m = matrix.get();
    const size_t stride = positive(width, "width"), tokens = positive(n, "n");
    require(stride >= m.cols, "width is ", width, ", but the matrices have ", m.cols, " columns");
    const HeadRows<const float> from{address<const float>(x, "x"), m.count * stride, stride};
    const HeadRows<float> to{address<float>(out, "out"), m.count * m.rows, m.rows};
    pool.perform([=](Pool& native, const Place&) { linear_heads(native, m, tokens, [&](size_t token, size_t head) { return from.row(token, head); }, to); });
}

// The cache but for its pages, which are the place's.
PagedKv latent_cache(const LatentCall& call, size_t rot_dim, uintptr_t cache, bool half, int64_t page_size) {
    PagedKv kv{};
    kv.half = half;
    kv.kv_heads = 1;
    kv.value_dim = call.k_b.rows;
    kv.head_dim = kv.value_dim + rot_dim;
    kv.page_size = checked_page_size(page_size);
    kv.k = half ? static_cast<void*>(address<uint16_t>(cache, "cache")) : address<float>(cache, "cache");
    return kv;
}

void py_attend_latent(PyPool& pool, uintptr_t q, uintptr_t latent, int64_t n, uintptr_t norm, float eps, uintptr_t table, int64_t positions, int64_t rot_dim,
                      bool interleaved, uintptr_t cache, bool half, int64_t page_size, const py::sequence& pages, int64_t start, const PyMatrix& k_b,
                      const PyMatrix& v_b, float scale, uintptr_t out) {
    const Matrix &k = k_b.get(), &v = v_b.get();
    require(k.count == v.count, "k_b has ", k.count, " heads, but v_b has ", v.count);
    require(k.rows == v.cols, "k_b has ", k.rows, " rows, but v_b has ", v.cols, " columns");
    LatentCall call{};
    call.q = address<const float>(q, "q");
    call.latents = address<float>(latent, "latent");
    call.out = address<float>(out, "out");
    call.n = positive(n, "n");
    call.scale = scale;
    call.norm = {address<const float>(norm, "norm"), eps};
    call.k_b = k;
    call.v_b = v;
    const Angles angles = checked_angles(table, positions, rot_dim, interleaved, static_cast<size_t>(rot_dim));
    call.kv = latent_cache(call, angles.first.rot_dim, cache, half, page_size);
    const auto run = [=](Pool& native, const Place& place) {
        require_pages(place, call.kv.page_size, call.n);
        LatentCall here = call;
        here.start = place.start;
        here.kv.pages = place.pages;
        here.rotation = angles.at(place, call.n);
        attend_latent(native, here);
    };
    pool.perform(run, place_now(pool.get(), pages, start));
}

}  // namespace

void bind_latent(py::class_<PyPool>& pool) {
    using py::arg;
    pool.def("linear_heads", &py_linear_heads, arg("matrix"), arg("x"), arg("n"), arg("width"), arg("out"))
        .def("attend_latent", &py_attend_latent, arg("q"), arg("latent"), arg("n"), arg("norm"), arg("eps"), arg("table"), arg("positions"),
             arg("rot_dim"), arg("interleaved"), arg("cache"), arg("half"), arg("page_size"), arg("pages"), arg("start"), arg("k_b"), arg("v_b"), arg("scale"), arg("out"));
}

}  // namespace moespan
