// spread, experts, route and sigmoid.
#include "layers/experts.h"

#include <algorithm>

#include "bindings/bindings.h"
#include "bindings/matrix.h"
#include "layers/route.h"

namespace moespan {
namespace {

// What a call of experts reads: the matrices as they are, or the parts that they were spread to. It holds on to nothing.
struct ExpertMatrices {
    Matrix gate, up, down;
    const Part *gates = nullptr, *ups = nullptr, *downs = nullptr;
    size_t count = 1;

    bool copies() const { return gates != nullptr && gates[0].cut == Cut::kNone; }

    template <class Call>
    void with_parts(const Call& call) const {
        Gated parts[kMaxNodes];
        if (gates == nullptr) parts[0] = {gate, up, down};
        for (size_t i = 0; gates != nullptr && i < count; ++i) parts[i] = {gates[i].matrix, ups[i].matrix, downs[i].matrix};
        call(Spread{parts, count, copies()});
    }
};

ExpertMatrices checked_experts(const Pool& pool, const PyMatrix& gate, const PyMatrix& up, const PyMatrix& down) {
    require_gated(gate.shape(), up.shape(), down.shape());
    require(gate.in_parts() == up.in_parts() && gate.in_parts() == down.in_parts(), "gate, up and down must all be packed after they were spread, or none");
    if (!gate.in_parts()) return {gate.get(), up.get(), down.get()};
    const size_t count = gate.parts().size();
    require(count == pool.nodes(), "the experts are spread over ", count, " nodes, but the pool has ", pool.nodes());
    return {gate.shape(), up.shape(), down.shape(), gate.parts().data(), up.parts().data(), down.parts().data(), count};
}

void py_spread(PyPool& pool, PyMatrix& gate, PyMatrix& up, PyMatrix& down, const std::vector<int>& memory, bool copies) {
    require_gated(gate.shape(), up.shape(), down.shape());
    const Pool& native = pool.get();
    require(memory.size() == native.nodes(), "memory of ", memory.size(), " nodes, but the pool has ", native.nodes());
    const KernelTable& kernels = native.kernels();
    const std::vector<Columns> parts = copies ? std::vector<Columns>(memory.size()) : slices(down.format(), down.shape().cols, memory.size());
    gate.spread(kernels, copies ? Cut::kNone : Cut::kRows, parts, memory);
    up.spread(kernels, copies ? Cut::kNone : Cut::kRows, parts, memory);
    down.spread(kernels, copies ? Cut::kNone : Cut::kColumns, parts, memory);
}

void py_experts(PyPool& pool, const PyMatrix& gate, const PyMatrix& up, const PyMatrix& down, uintptr_t x, int64_t n, uintptr_t ids, uintptr_t weights,
                int64_t top_k, uintptr_t out, bool accumulate) {
    const ExpertMatrices matrices = checked_experts(pool.get(), gate, up, down);
    const auto* input = address<const float>(x, "x");
    const Routes routes{address<const int32_t>(ids, "ids"), address<const float>(weights, "weights"), positive(n, "n"), positive(top_k, "top_k")};
    auto* output = address<float>(out, "out");
    pool.perform([=](Pool& native, const Place&) {
        for (size_t i = 0; i < routes.n * routes.top_k; ++i) {
            const int32_t id = routes.ids[i];
            require(id >= -1 && (id < 0 || static_cast<size_t>(id) < matrices.gate.count), "expert ", id, " of ", matrices.gate.count);
        }
        matrices.with_parts([&](const Spread& spread) { experts(native, spread, input, routes, output, accumulate); });
    });
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
    const Matrix matrix = router.get();
    require_single(matrix, "router");
    const Routing routing = checked_routing(matrix, top_k, sigmoid, normalize, scale, groups, groups_used, group_top, bias);
    const auto* input = address<const float>(x, "x");
    const size_t tokens = positive(n, "n");
    auto* chosen = address<int32_t>(ids, "ids");
    auto* factors = address<float>(weights, "weights");
    pool.perform([=](Pool& native, const Place&) { route(native, matrix, routing, input, tokens, chosen, factors); });
}

void py_sigmoid(PyPool& pool, uintptr_t x, int64_t count) {
    auto* values = address<float>(x, "x");
    const size_t length = positive(count, "count");
    pool.perform([=](Pool&, const Place&) { sigmoid(values, length); });
}

}  // namespace

void bind_experts(py::class_<PyPool>& pool) {
    using py::arg;
    pool.def("spread", &py_spread, arg("gate"), arg("up"), arg("down"), arg("memory"), arg("copies"));
    pool.def("experts", &py_experts, arg("gate"), arg("up"), arg("down"), arg("x"), arg("n"), arg("ids"), arg("weights"), arg("top_k"), arg("out"),
             arg("accumulate") = true)
        .def("sigmoid", &py_sigmoid, arg("x"), arg("count"))
        .def("route", &py_route, arg("router"), arg("top_k"), arg("sigmoid"), arg("normalize"), arg("scale"), arg("groups"), arg("groups_used"),
             arg("group_top"), arg("bias"), arg("x"), arg("n"), arg("ids"), arg("weights"));
}

}  // namespace moespan
