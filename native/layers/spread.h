// Whether work is worth waking the pool for.
#pragma once

#include <cstddef>

#include "pool/pool.h"

namespace moespan {

// Calls work(i, scratch) for each i of 0 .. count - 1: on the whole pool, or, when the work is `small` (less than the few microseconds
// that a fork and a join take), on the calling thread alone.
template <class Work>
void spread(Pool& pool, size_t count, bool small, const Work& work) {
    if (small) return pool.each_here(count, work);
    pool.each(count, work);
}

}  // namespace moespan
