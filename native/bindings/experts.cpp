// experts and route.
#include "layers/experts.h"

#include <algorithm>

#include "bindings/bindings.h"
#include "bindings/matrix.h"
#include "layers/route.h"

namespace moespan {
namespace {

void py_experts(PyPool& pool, const PyMatrix& gate, const PyMatrix& up, const PyMatrix& down, uintptr_t x, int64_t n, uintptr_t ids, uintptr_t weights,
                int64_t top_k, uintptr_t out) {
    const Matrix &g = gate.get(), &u = up.get(), &d = down.get();
    require_gated(g, u, d);
    Pool& native = pool.get();
    const auto* input = address<const float>(x, "x");
    const Routes routes{address<const int32_t>(ids, "ids"), address<const float>(weights, "weights"), positive(n, "n"), positive(top_k, "top_k")};
    auto* output = address<float>(out, "out");
    for (size_t i = 0; i < routes.n * routes.top_k; ++i) {
        require(routes.ids[i] >= 0 && static_cast<size_t>(routes.ids[i]) < g.count, "expert ", routes.ids[i], " of ", g.count);
    }
    py::gil_scoped_release release;
    experts(native, g, u, d, input, routes, output);
}

Routing checked_routing(const Matrix& router, int64_t top_k, bool sigmoid, bool normalize, float scale, int64_t groups, int64_t groups_used,
                        int64_t group_top, uintptr_t bias) {
    Routing routing{positive(top_k, "top_k"), sigmoid, normalize, scale, positive(groups, "groups"), positive(groups_used, "groups_used"),
                    positive(group_top, "group_top"), bias == 0 ? nullptr : address<const float>(bias, "bias")};
    require(routing.groups <= kMaxExpertGroups, groups, " groups of experts, but at most ", kMaxExpertGroups, " are supported");
    require(router.rows % routing.groups == 0, router.rows, " experts cannot stand in ", groups, " equal groups");
    const size_t size = router.rows / routing.groups;
    require(routing.groups_used <= routing.groups, groups_used, " groups to use, but there are ", groups);
    require(routing.group_top <= std::min(size, kMaxExpertGroups), "group_top is ", group_top, ", but a group has ", size, " experts");
    require(routing.top_k <= routing.groups_used * size, "top_k is ", top_k, ", but the groups in use have ", routing.groups_used * size, " experts");
    return routing;
}

void py_route(PyPool& pool, const PyMatrix& router, int64_t top_k, bool sigmoid, bool normalize, float scale, int64_t groups, int64_t groups_used,
              int64_t group_top, uintptr_t bias, uintptr_t x, int64_t n, uintptr_t ids, uintptr_t weights) {
    const Matrix& matrix = router.get();
    require_single(matrix, "router");
    const Routing routing = checked_routing(matrix, top_k, sigmoid, normalize, scale, groups, groups_used, group_top, bias);
    Pool& native = pool.get();
    const auto* input = address<const float>(x, "x");
    const size_t tokens = positive(n, "n");
    auto* chosen = address<int32_t>(ids, "ids");
    auto* factors = address<float>(weights, "weights");
    py::gil_scoped_release release;
    route(native, matrix, routing, input, tokens, chosen, factors);
}

}  // namespace

void bind_experts(py::class_<PyPool>& pool) {
    using py::arg;
    pool.def("experts", &py_experts, arg("gate"), arg("up"), arg("down"), arg("x"), arg("n"), arg("ids"), arg("weights"), arg("top_k"), arg("out"))
        .def("route", &py_route, arg("router"), arg("top_k"), arg("sigmoid"), arg("normalize"), arg("scale"), arg("groups"), arg("groups_used"),
             arg("group_top"), arg("bias"), arg("x"), arg("n"), arg("ids"), arg("weights"));
}

}  // namespace moespan
