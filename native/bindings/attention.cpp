// rms_norm, rope, store_kv, attention, and attend, which is the last three in one call.
#include "bindings/bindings.h"
#include "bindings/cache.h"
#include "layers/attention.h"
#include "layers/norm.h"
#include "layers/rope.h"

namespace moespan {
namespace {

void py_rms_norm(PyPool& pool, uintptr_t x, uintptr_t weight, uintptr_t out, int64_t n, int64_t dim, float eps) {
    const auto *input = address<const float>(x, "x"), *factors = address<const float>(weight, "weight");
    auto* output = address<float>(out, "out");
    const size_t rows = positive(n, "n"), cols = positive(dim, "dim");
    pool.perform([=](Pool& native, const Place&) { rms_norm(native, input, factors, output, rows, cols, eps); });
}

void py_rope(PyPool& pool, uintptr_t x, int64_t n, int64_t heads, int64_t head_dim, int64_t rot_dim, uintptr_t table, bool interleaved) {
    auto* values = address<float>(x, "x");
    const size_t tokens = positive(n, "n"), count = positive(heads, "heads"), size = positive(head_dim, "head_dim");
    const Rotation rotation = checked_angles(table, n, rot_dim, interleaved, size).first;
    pool.perform([=](Pool& native, const Place&) { rope(native, values, tokens, count, size, rotation.rot_dim, rotation.table, interleaved); });
}

// What store_kv and attention say alike about the cache, checked; its pages are the place's.
struct CacheArguments {
    int64_t n, kv_heads, head_dim;
    uintptr_t k_cache, v_cache;
    bool half;
    int64_t page_size;

    PagedKv checked() const {
        PagedKv kv{};
        kv.half = half;
        kv.kv_heads = positive(kv_heads, "kv_heads");
        kv.head_dim = kv.value_dim = positive(head_dim, "head_dim");
        kv.page_size = checked_page_size(page_size);
        kv.k = half ? static_cast<void*>(address<uint16_t>(k_cache, "k_cache")) : address<float>(k_cache, "k_cache");
        kv.v = half ? static_cast<void*>(address<uint16_t>(v_cache, "v_cache")) : address<float>(v_cache, "v_cache");
        return kv;
    }
};

Attention attention_call(const CacheArguments& cache, uintptr_t q, int64_t heads, float scale, uintptr_t out) {
    Attention call{};
    call.kv = cache.checked();
    call.q = address<const float>(q, "q");
    call.out = address<float>(out, "out");
    call.n = positive(cache.n, "n");
    call.heads = positive(heads, "heads");
    call.scale = scale;
    require(call.heads % call.kv.kv_heads == 0, "heads is ", heads, ", but must be a multiple of kv_heads, ", cache.kv_heads);
    return call;
}

Attention at(Attention call, const Place& place) {
    require_pages(place, call.kv.page_size, call.n);
    call.start = place.start;
    call.kv.pages = place.pages;
    return call;
}

void py_store_kv(PyPool& pool, uintptr_t k, uintptr_t v, int64_t n, int64_t kv_heads, int64_t head_dim, uintptr_t k_cache, uintptr_t v_cache, bool half,
                 int64_t page_size, const py::sequence& pages, int64_t start) {
    const PagedKv cache = CacheArguments{n, kv_heads, head_dim, k_cache, v_cache, half, page_size}.checked();
    const auto *keys = address<const float>(k, "k"), *values = address<const float>(v, "v");
    const size_t tokens = positive(n, "n");
    const auto store = [=](Pool& native, const Place& place) {
        require_pages(place, cache.page_size, tokens);
        PagedKv kv = cache;
        kv.pages = place.pages;
        store_kv(native, kv, keys, values, tokens, place.start);
    };
    pool.perform(store, place_now(pool.get(), pages, start));
}

void py_attention(PyPool& pool, uintptr_t q, int64_t n, int64_t heads, int64_t kv_heads, int64_t head_dim, uintptr_t k_cache, uintptr_t v_cache, bool half,
                  int64_t page_size, const py::sequence& pages, int64_t start, float scale, uintptr_t out) {
    const Attention call = attention_call({n, kv_heads, head_dim, k_cache, v_cache, half, page_size}, q, heads, scale, out);
    pool.perform([call](Pool& native, const Place& place) { attention(native, at(call, place)); }, place_now(pool.get(), pages, start));
}

void py_attend(PyPool& pool, uintptr_t q, uintptr_t k, uintptr_t v, int64_t n, int64_t heads, int64_t kv_heads, int64_t head_dim, uintptr_t table,
               int64_t positions, int64_t rot_dim, bool interleaved, uintptr_t k_cache, uintptr_t v_cache, bool half, int64_t page_size,
               const py::sequence& pages, int64_t start, float scale, uintptr_t out) {
    const Attention call = attention_call({n, kv_heads, head_dim, k_cache, v_cache, half, page_size}, q, heads, scale, out);
    auto *queries = address<float>(q, "q"), *keys = address<float>(k, "k");
    const auto* values = address<const float>(v, "v");
    const Angles angles = checked_angles(table, positions, rot_dim, interleaved, call.kv.head_dim);
    const auto run = [=](Pool& native, const Place& place) { attend(native, at(call, place), queries, keys, values, angles.at(place, call.n)); };
    pool.perform(run, place_now(pool.get(), pages, start));
}

}  // namespace

void bind_attention(py::class_<PyPool>& pool) {
    using py::arg;
    pool.def("rms_norm", &py_rms_norm, arg("x"), arg("weight"), arg("out"), arg("n"), arg("dim"), arg("eps"))
        .def("rope", &py_rope, arg("x"), arg("n"), arg("heads"), arg("head_dim"), arg("rot_dim"), arg("table"), arg("interleaved"))
        .def("store_kv", &py_store_kv, arg("k"), arg("v"), arg("n"), arg("kv_heads"), arg("head_dim"), arg("k_cache"), arg("v_cache"), arg("half"),
             arg("page_size"), arg("pages"), arg("start"))
        .def("attention", &py_attention, arg("q"), arg("n"), arg("heads"), arg("kv_heads"), arg("head_dim"), arg("k_cache"), arg("v_cache"), arg("half"),
             arg("page_size"), arg("pages"), arg("start"), arg("scale"), arg("out"))
        .def("attend", &py_attend, arg("q"), arg("k"), arg("v"), arg("n"), arg("heads"), arg("kv_heads"), arg("head_dim"), arg("table"),
             arg("positions"), arg("rot_dim"), arg("interleaved"), arg("k_cache"), arg("v_cache"), arg("half"), arg("page_size"), arg("pages"), arg("start"), arg("scale"), arg("out"));
}

}  // namespace moespan
