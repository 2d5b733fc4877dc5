// Rotary position embedding (Su et al., 2021, arXiv:2104.09864): each pair (x, y) of a head becomes (x cos - y sin, y cos + x sin).
#pragma once

#include <stddef.h>

namespace moespan {
namespace {

inline void rotate_pair(float& x, float& y, float cos, float sin) {
    const float rotated = x * cos - y * sin;
    y = y * cos + x * sin;
    x = rotated;
}

template <class V>
void rotate(typename V::Reg& x, typename V::Reg& y, typename V::Reg cos, typename V::Reg sin) {
    const auto rotated = V::sub(V::mul(x, cos), V::mul(y, sin));
    y = V::fma(y, cos, V::mul(x, sin));
    x = rotated;
}

// Pairs (2i, 2i + 1), as llama's GGUF files want.
template <class V>
void rope_interleaved(float* head, size_t pairs, const float* table) {
    constexpr size_t kLanes = V::kLanes;
    typename V::Reg x, y, cos, sin, low, high;
    size_t i = 0;
    for (; i + kLanes <= pairs; i += kLanes) {
        float* at = head + 2 * i;
        V::unzip(V::load(at), V::load(at + kLanes), x, y);
        V::unzip(V::load(table + 2 * i), V::load(table + 2 * i + kLanes), cos, sin);
        rotate<V>(x, y, cos, sin);
        V::zip(x, y, low, high);
        V::store(at, low);
        V::store(at + kLanes, high);
    }
    for (; i < pairs; ++i) rotate_pair(head[2 * i], head[2 * i + 1], table[2 * i], table[2 * i + 1]);
}

// Pairs (i, i + pairs), as NeoX.
template <class V>
void rope_neox(float* head, size_t pairs, const float* table) {
    constexpr size_t kLanes = V::kLanes;
    typename V::Reg cos, sin;
    size_t i = 0;
    for (; i + kLanes <= pairs; i += kLanes) {
        auto x = V::load(head + i), y = V::load(head + pairs + i);
        V::unzip(V::load(table + 2 * i), V::load(table + 2 * i + kLanes), cos, sin);
        rotate<V>(x, y, cos, sin);
        V::store(head + i, x);
        V::store(head + pairs + i, y);
    }
    for (; i < pairs; ++i) rotate_pair(head[i], head[pairs + i], table[2 * i], table[2 * i + 1]);
}

// x [n][heads][head_dim] in place: the first rot_dim values of each head; table [n][rot_dim / 2][2] holds (cos, sin).
template <class V>
void rope(float* x, size_t n, size_t heads, size_t head_dim, size_t rot_dim, const float* table, bool interleaved) {
    const auto rotate_head = interleaved ? rope_interleaved<V> : rope_neox<V>;
    for (size_t token = 0; token < n; ++token) {
        for (size_t head = 0; head < heads; ++head) rotate_head(x + (token * heads + head) * head_dim, rot_dim / 2, table + token * rot_dim);
    }
}

}  // namespace
}  // namespace moespan
