// RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467): y = x / sqrt(mean(x^2) + eps) * weight.
#pragma once

#include <stddef.h>

namespace moespan {
namespace {

// Four sums, so that the additions do not wait for each other.
template <class V>
float sum_of_squares(const float* x, size_t count) {
    constexpr size_t kLanes = V::kLanes;
    typename V::Reg sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    size_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        for (size_t j = 0; j < 4; ++j) {
            const auto value = V::load(x + i + j * kLanes);
            sum[j] = V::fma(value, value, sum[j]);
        }
    }
    for (; i < count; i += kLanes) {
        const auto value = V::load_partial(x + i, (int)(count - i < kLanes ? count - i : kLanes));
        sum[0] = V::fma(value, value, sum[0]);
    }
    return V::reduce_sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
}

// x, out [rows][dim], weight [dim]; out may be x.
template <class V>
void rms_norm(const float* x, const float* weight, float* out, size_t rows, size_t dim, float eps) {
    constexpr size_t kLanes = V::kLanes;
    for (const float* end = x + rows * dim; x != end; x += dim, out += dim) {
        const auto mean = V::broadcast(sum_of_squares<V>(x, dim) / (float)dim + eps);
        const auto scale = V::div(V::broadcast(1.0f), V::sqrt(mean));
        size_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) V::store(out + i, V::mul(V::mul(V::load(x + i), scale), V::load(weight + i)));
        const int rest = (int)(dim - i);
        V::store_partial(out + i, V::mul(V::mul(V::load_partial(x + i, rest), scale), V::load_partial(weight + i, rest)), rest);
    }
}

}  // namespace
}  // namespace moespan
