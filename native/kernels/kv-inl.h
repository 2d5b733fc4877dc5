// The paged KV cache: writing new tokens into it, and taking a block of its keys and values out as float panels.
//
// Keys lie transposed in a page, [head_dim][page_size], values as they are, [page_size][head_dim]; T is float, or uint16_t for halves.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "isa/kernels.h"
#include "product-inl.h"

namespace moespan {
namespace {

template <class T>
T* key_page(const PagedKv& kv, size_t page, size_t head) {
    return (T*)kv.k + ((size_t)kv.pages[page] * kv.kv_heads + head) * kv.head_dim * kv.page_size;
}

template <class T>
T* value_page(const PagedKv& kv, size_t page, size_t head) {
    return (T*)kv.v + ((size_t)kv.pages[page] * kv.kv_heads + head) * kv.head_dim * kv.page_size;
}

// Calls visit(page, slot, position, count) for each run of positions begin .. end - 1 that lies in one page.
template <class Visit>
void each_page(const PagedKv& kv, size_t begin, size_t end, const Visit& visit) {
    for (size_t position = begin; position < end;) {
        const size_t slot = position % kv.page_size;
        const size_t room = kv.page_size - slot, left = end - position;
        const size_t count = room < left ? room : left;
        visit(position / kv.page_size, slot, position, count);
        position += count;
    }
}

// --- writing ---

template <class V>
void store_floats(float* p, typename V::Reg x) {
    V::store(p, x);
}

template <class V>
void store_floats(uint16_t* p, typename V::Reg x) {
    V::store_half(p, x);
}

template <class V>
void store_floats_partial(float* p, typename V::Reg x, int n) {
    V::store_partial(p, x, n);
}

template <class V>
void store_floats_partial(uint16_t* p, typename V::Reg x, int n) {
    V::store_half_partial(p, x, n);
}

// to [count] = from [count], converted.
template <class V, class T>
void convert_row(const float* from, T* to, size_t count) {
    size_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) store_floats<V>(to + i, V::load(from + i));
    const int rest = (int)(count - i);
    if (rest > 0) store_floats_partial<V>(to + i, V::load_partial(from + i, rest), rest);
}

// Keys of `count` tokens, `stride` floats apart, into slots of a transposed page: 16 dimensions at once through a small array.
template <class V, class T>
void store_keys(const float* k, size_t stride, size_t count, size_t head_dim, size_t page_size, T* slots) {
    for (size_t d = 0; d < head_dim; d += kPanel) {
        const size_t dims = head_dim - d < kPanel ? head_dim - d : kPanel;
        for (size_t token = 0; token < count; ++token) {
            T converted[kPanel];
            convert_row<V>(k + token * stride + d, converted, dims);
            for (size_t i = 0; i < dims; ++i) slots[(d + i) * page_size + token] = converted[i];
        }
    }
}

template <class V, class T>
void store_kv_as(const PagedKv& kv, const float* k, const float* v, size_t head, size_t first, size_t begin, size_t end) {
    const size_t stride = kv.kv_heads * kv.head_dim;
    each_page(kv, begin, end, [&](size_t page, size_t slot, size_t position, size_t count) {
        const size_t offset = (position - first) * stride + head * kv.head_dim;
        store_keys<V>(k + offset, stride, count, kv.head_dim, kv.page_size, key_page<T>(kv, page, head) + slot);
        T* values = value_page<T>(kv, page, head) + slot * kv.head_dim;
        for (size_t token = 0; token < count; ++token) convert_row<V>(v + offset + token * stride, values + token * kv.head_dim, kv.head_dim);
    });
}

// Positions begin .. end - 1 of one head; row 0 of k, v [n][kv_heads][head_dim] is position `first`.
template <class V>
void store_kv(const PagedKv& kv, const float* k, const float* v, size_t head, size_t first, size_t begin, size_t end) {
    const auto store = kv.half ? store_kv_as<V, uint16_t> : store_kv_as<V, float>;
    store(kv, k, v, head, first, begin, end);
}

// --- reading ---

// Keys begin .. end - 1 of one head (begin a multiple of 16) as panels [(end - begin) / 16, rounded up][head_dim][16]. Columns beyond the
// end hold whatever the page holds.
template <class V, class T>
void unpack_keys(const PagedKv& kv, size_t head, size_t begin, size_t end, float* panels) {
    each_page(kv, begin, end, [&](size_t page, size_t slot, size_t position, size_t count) {
        for (size_t i = 0; i < count; i += kPanel) {
            const T* from = key_page<T>(kv, page, head) + slot + i;
            float* to = panels + (position - begin + i) * kv.head_dim;
            for (size_t d = 0; d < kv.head_dim; ++d, from += kv.page_size, to += kPanel) {
                for (size_t j = 0; j < kPanel; j += V::kLanes) V::store(to + j, load_floats<V>(from + j));
            }
        }
    });
}

// Values of the same keys as panels [head_dim / 16, rounded up][panel_rows][16], with zeros beyond head_dim.
template <class V, class T>
void unpack_values(const PagedKv& kv, size_t head, size_t begin, size_t end, size_t panel_rows, float* panels) {
    each_page(kv, begin, end, [&](size_t page, size_t slot, size_t position, size_t count) {
        const T* from = value_page<T>(kv, page, head) + slot * kv.head_dim;
        float* to = panels + (position - begin) * kPanel;
        for (size_t i = 0; i < count; ++i, from += kv.head_dim, to += kPanel) {
            for (size_t d = 0; d < (kv.head_dim + kPanel - 1) / kPanel * kPanel; d += V::kLanes) {
                const size_t left = d < kv.head_dim ? kv.head_dim - d : 0;
                const auto values = left < V::kLanes ? load_floats_partial<V>(from + d, (int)left) : load_floats<V>(from + d);
                V::store(to + d / kPanel * panel_rows * kPanel + d % kPanel, values);
            }
        }
    });
}

}  // namespace
}  // namespace moespan
