// The small float matrix product under attention: c [rows][16 panels] (+)= a [rows][depth] @ b [depth][16 panels].
//
// b comes in panels of 16 columns, so that a row of a panel is one or two vectors, every product is a broadcast of a times a vector of b, and
// no horizontal sum is needed: transposed keys for the scores, values as they are for the output. T is float, or uint16_t for halves,
// which are converted as they are read.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moespan {
namespace {

constexpr size_t kPanel = 16;

// Row d of panel p starts at data + p * panel_stride + d * row_stride.
template <class T>
struct Panels {
    const T* data;
    size_t row_stride, panel_stride;
};

template <class V>
typename V::Reg load_floats(const float* p) {
    return V::load(p);
}

template <class V>
typename V::Reg load_floats(const uint16_t* p) {
    return V::load_half(p);
}

template <class V>
typename V::Reg load_floats_partial(const float* p, int n) {
    return V::load_partial(p, n);
}

template <class V>
typename V::Reg load_floats_partial(const uint16_t* p, int n) {
    return V::load_half_partial(p, n);
}

template <class V>
struct ProductShape {
    static constexpr size_t kVecs = kPanel / V::kLanes;
    // Twelve sums in registers hide the latency of the multiply-add (4 cycles, two a cycle) and leave room for b and the broadcast.
    static constexpr size_t kRows = 12 / kVecs;
};

// One block of Rows rows and one panel.
template <class V, size_t Rows, class T>
void product_block(const float* a, size_t a_stride, const T* b, size_t b_stride, size_t depth, float* c, size_t c_stride, bool accumulate) {
    constexpr size_t kVecs = ProductShape<V>::kVecs;
    typename V::Reg sum[Rows][kVecs];
#pragma GCC unroll 16
    for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (size_t j = 0; j < kVecs; ++j) sum[r][j] = accumulate ? V::load(c + r * c_stride + j * V::kLanes) : V::zero();
    }
    for (size_t d = 0; d < depth; ++d, b += b_stride) {
        typename V::Reg row[kVecs];
#pragma GCC unroll 2
        for (size_t j = 0; j < kVecs; ++j) row[j] = load_floats<V>(b + j * V::kLanes);
#pragma GCC unroll 16
        for (size_t r = 0; r < Rows; ++r) {
            const auto factor = V::broadcast(a[r * a_stride + d]);
#pragma GCC unroll 2
            for (size_t j = 0; j < kVecs; ++j) sum[r][j] = V::fma(factor, row[j], sum[r][j]);
        }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (size_t j = 0; j < kVecs; ++j) V::store(c + r * c_stride + j * V::kLanes, sum[r][j]);
    }
}

// The same for 1 <= rows <= kRows, by the block of just that many.
template <class V, class T, size_t Rows = ProductShape<V>::kRows>
void product_rows(size_t rows, const float* a, size_t a_stride, const T* b, size_t b_stride, size_t depth, float* c, size_t c_stride, bool accumulate) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return product_rows<V, T, Rows - 1>(rows, a, a_stride, b, b_stride, depth, c, c_stride, accumulate);
    }
    product_block<V, Rows, T>(a, a_stride, b, b_stride, depth, c, c_stride, accumulate);
}

}  // namespace
}  // namespace moespan
