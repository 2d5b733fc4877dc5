// Checks that all kinds of attention share.
#pragma once

#include "bindings/bindings.h"
#include "layers/attention.h"
#include "layers/program.h"

namespace moespan {

// Where an operation that runs at once finds the sequence: its pages are copied into memory that the pool keeps, so that a step allocates nothing.
inline Place place_now(Pool& pool, const py::sequence& pages, int64_t start) {
    require(start >= 0, "start is ", start, ", but must not be negative");
    const size_t count = pages.size();
    auto* copy = static_cast<int32_t*>(pool.shared(Shared::kPages, count * sizeof(int32_t)));
    for (size_t i = 0; i < count; ++i) {
        copy[i] = pages[i].cast<int32_t>();
        require(copy[i] >= 0, "page ", i, " is ", copy[i], ", but must not be negative");
    }
    return {static_cast<size_t>(start), copy, count};
}

inline size_t checked_page_size(int64_t page_size) {
    const size_t tokens = positive(page_size, "page_size");
    require(tokens % 16 == 0, "page_size is ", page_size, ", but must be a multiple of 16");
    return tokens;
}

inline void require_pages(const Place& place, size_t page_size, size_t n) {
    const size_t tokens = place.start + n;
    require(place.page_count * page_size >= tokens, place.page_count, " pages of ", page_size, " tokens cannot hold ", tokens, " tokens");
}

// The rotary table of positions 0 .. positions - 1.
struct Angles {
    Rotation first;  // position 0's
    size_t positions;

    Rotation at(const Place& place, size_t n) const {
        require(place.start + n <= positions, "the rotary table has ", positions, " positions, too few for ", place.start + n);
        Rotation rotation = first;
        rotation.table += place.start * first.rot_dim;
        return rotation;
    }
};

inline Angles checked_angles(uintptr_t table, int64_t positions, int64_t rot_dim, bool interleaved, size_t head_dim) {
    const size_t rotated = positive(rot_dim, "rot_dim");
    require(rotated % 2 == 0 && rotated <= head_dim, "rot_dim is ", rot_dim, ", but must be even and at most head_dim, ", head_dim);
    return {{address<const float>(table, "table"), rotated, interleaved}, positive(positions, "positions")};
}

}  // namespace moespan
