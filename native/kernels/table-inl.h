// The kernel table of one instruction set: every format and every kernel body over its Ops.
#pragma once

#include "activation-inl.h"
#include "attention-inl.h"
#include "dequantize-inl.h"
#include "formats-inl.h"
#include "formats_iq-inl.h"
#include "formats_k-inl.h"
#include "gemm-inl.h"
#include "gemv-inl.h"
#include "isa/kernels.h"
#include "kv-inl.h"
#include "latent-inl.h"
#include "norm-inl.h"
#include "rope-inl.h"
#include "sweep-inl.h"
#include "strips-inl.h"
#include "tiles_iq-inl.h"
#include "tiles_k-inl.h"

namespace moespan {
namespace {

template <class Ops, class Format>
constexpr FormatKernels quantised() {
    return {Format::kType, Format::kBlock, sizeof(typename Format::Block), false, 4,
            gemv<Ops, Format>, gemm<Ops, Format>, Panel<Ops, Format>::bytes, dequantize<Ops, Format>, {}};
}

template <class Ops, class Format>
constexpr FormatKernels floating() {
    return {Format::kType, 1, sizeof(typename Format::Element), true, 16,
            gemv_float<Ops, Format>, gemm_float<Ops, Format>, float_panel_bytes<Ops>, dequantize_float<Ops, Format>, {}};
}

// A format in both orders.
template <class Ops, class Tiles>
constexpr FormatKernels tiled() {
    FormatKernels both = quantised<Ops, typename Tiles::RowOrder>();
    both.panel_bytes = Panel<Ops, Tiles>::bytes;
    both.tiles = {8, strip_bytes<Tiles>, pack_strip<Ops, Tiles>, gemv_strips<Ops, Tiles>, gemm_strips<Ops, Tiles>};
    return both;
}

template <class Ops>
constexpr FormatKernels kFormats[] = {
    floating<Ops, F32<Ops>>(), floating<Ops, F16<Ops>>(), floating<Ops, BF16<Ops>>(),
    tiled<Ops, Q4_0Tiles<Ops>>(), tiled<Ops, Q4_1Tiles<Ops>>(), tiled<Ops, Q5_0Tiles<Ops>>(), tiled<Ops, Q5_1Tiles<Ops>>(), tiled<Ops, Q8_0Tiles<Ops>>(),
    tiled<Ops, Q4_KTiles<Ops>>(), tiled<Ops, Q5_KTiles<Ops>>(), tiled<Ops, Q6_KTiles<Ops>>(),
    tiled<Ops, Q2_KTiles<Ops>>(), tiled<Ops, Q3_KTiles<Ops>>(), tiled<Ops, IQ4_NLTiles<Ops>>(), tiled<Ops, IQ4_XSTiles<Ops>>(), tiled<Ops, MXFP4Tiles<Ops>>(),
    quantised<Ops, IQ1_S<Ops>>(), quantised<Ops, IQ1_M<Ops>>(), quantised<Ops, IQ2_XXS<Ops>>(), quantised<Ops, IQ2_XS<Ops>>(), quantised<Ops, IQ2_S<Ops>>(),
    quantised<Ops, IQ3_XXS<Ops>>(), quantised<Ops, IQ3_S<Ops>>(),
};

template <class Ops, class Peaks>
constexpr KernelTable make_table(const char* name) {
    return {
        .name = name,
        .panel_rows = Ops::kLanes,
        .formats = kFormats<Ops>,
        .format_count = sizeof(kFormats<Ops>) / sizeof(kFormats<Ops>[0]),
        .bf16 = nullptr,
        .quantize = quantize<Ops>,
        .silu_mul = silu_mul<Ops>,
        .rms_norm = rms_norm<Ops>,
        .rope = rope<Ops>,
        .store_kv = store_kv<Ops>,
        .attention_scratch_bytes = attention_scratch_bytes,
        .attend = attend<Ops>,
        .merge_splits = merge_splits<Ops>,
        .store_latents = store_latents<Ops>,
        .latent_scratch_bytes = latent_scratch_bytes,
        .attend_latent = attend_latent<Ops>,
        .read_all = read_all<typename Peaks::Vec>,
        .peaks = Peaks::kLoops,
        .peak_count = sizeof(Peaks::kLoops) / sizeof(Peaks::kLoops[0]),
    };
}

}  // namespace
}  // namespace moespan
