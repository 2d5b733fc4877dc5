// Reads memory as fast as loads can: what a kernel that memory limits is compared with.
#pragma once

#include <stddef.h>

namespace moespan {
namespace {

// The sum of data [count]: a value that all of them have a part in, so that no load can be left out. `count` is a multiple of 4 * kLanes. (Data
// should be ordinary numbers: additions of subnormal ones are slow.)
template <class V>
float read_all(const float* data, size_t count) {
    constexpr size_t kLanes = V::kLanes, kLoads = 4;
    typename V::Reg sums[kLoads];
    for (auto& sum : sums) sum = V::zero();
    for (size_t i = 0; i < count; i += kLoads * kLanes) {
#pragma GCC unroll 4
        for (size_t j = 0; j < kLoads; ++j) sums[j] = V::add(sums[j], V::load(data + i + j * kLanes));
    }
    for (size_t j = 1; j < kLoads; ++j) sums[0] = V::add(sums[0], sums[j]);
    return V::reduce_sum(sums[0]);
}

}  // namespace
}  // namespace moespan
