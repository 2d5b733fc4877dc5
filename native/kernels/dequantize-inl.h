// One row of a weight matrix to floats: for embeddings.
#pragma once

#include "formats-inl.h"

namespace moespan {
namespace {

template <class Ops, class Format>
void dequantize(const uint8_t* row, size_t cols, float* out) {
    constexpr size_t kSpanBytes = sizeof(typename Format::Block) * (kSpan / Format::kBlock);
    const size_t subs = cols / kSubBlock;
    for (size_t first = 0; first < subs; first += kSpanSubs, row += kSpanBytes) {
        const int count = subs - first < kSpanSubs ? (int)(subs - first) : kSpanSubs;
        const auto s = Format::scales(row, count);
        float scale[kSpan / Format::kGroup], offset[kSpan / Format::kGroup];
        for (int v = 0; v < s.kVectors; ++v) {
            Ops::V8::store(scale + 8 * v, s.scale[v]);
            Ops::V8::store(offset + 8 * v, s.offset[v]);
        }
        typename OpenedSpan<Format>::Type opened;
        OpenedSpan<Format>::open(row, opened);
        for (int j = 0; j < count; ++j, out += kSubBlock) {
            uint8_t codes[kSubBlock];
            Ops::store_codes(codes, Format::codes(opened, j));
            for (int i = 0; i < kSubBlock; ++i) {
                const int g = (j * kSubBlock + i) / Format::kGroup;
                out[i] = scale[g] * (float)(Format::kSigned ? (int8_t)codes[i] : codes[i]) + offset[g];
            }
        }
    }
}

template <class Ops, class Format>
void dequantize_float(const uint8_t* row, size_t cols, float* out) {
    using Element = typename Format::Element;
    const Element* elements = (const Element*)row;
    size_t k = 0;
    for (; k + Ops::kLanes <= cols; k += Ops::kLanes) Ops::store(out + k, Format::load(elements + k));
    if (k < cols) {
        Element tail[Ops::kLanes] = {};
        memcpy(tail, elements + k, (cols - k) * sizeof(Element));
        Ops::store_partial(out + k, Format::load(tail), (int)(cols - k));
    }
}

}  // namespace
}  // namespace moespan
