// Whether work is worth waking the pool for.
#pragma once

#include <cstddef>

#include "pool/pool.h"

namespace moespan {

// Calls work(i, scratch) for each i of 0 .. count - 1: on the whole pool, or, when the work is `small` (less than the few microseconds
// that a fork and a join take), on the calling thread alone.
template <class Work>
void spread(Pool& pool, size_t count, bool small, const Work& work) {
    if (small || count == 1 || pool.threads() == 1) {
        uint8_t* scratch = Worker(pool, 0).scratch();
        for (size_t i = 0; i < count; ++i) work(i, scratch);
        return;
    }
    pool.run([&](Worker& worker) { worker.each(count, [&](size_t i) { work(i, worker.scratch()); }); });
}

}  // namespace moespan
