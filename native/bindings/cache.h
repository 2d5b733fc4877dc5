// Checks that all kinds of attention share.
#pragma once

#include "bindings/bindings.h"
#include "layers/attention.h"

namespace moespan {

// The sequence's pages, copied into memory that the pool keeps, so that a step allocates nothing.
inline const int32_t* copy_pages(Pool& pool, const py::sequence& pages, size_t page_size, size_t tokens) {
    const size_t count = pages.size();
    require(page_size % 16 == 0, "page_size is ", page_size, ", but must be a multiple of 16");
    require(count * page_size >= tokens, count, " pages of ", page_size, " tokens cannot hold ", tokens, " tokens");
    auto* copy = static_cast<int32_t*>(pool.shared(Shared::kPages, count * sizeof(int32_t)));
    for (size_t i = 0; i < count; ++i) {
        copy[i] = pages[i].cast<int32_t>();
        require(copy[i] >= 0, "page ", i, " is ", copy[i], ", but must not be negative");
    }
    return copy;
}

inline Rotation checked_rotation(uintptr_t table, int64_t rot_dim, bool interleaved, size_t head_dim) {
    const size_t rotated = positive(rot_dim, "rot_dim");
    require(rotated % 2 == 0 && rotated <= head_dim, "rot_dim is ", rot_dim, ", but must be even and at most head_dim, ", head_dim);
    return {address<const float>(table, "table"), rotated, interleaved};
}

}  // namespace moespan
