// The kernel table of one instruction set: every format and every kernel body over its Ops.
#pragma once

#include "activation-inl.h"
#include "attention-inl.h"
#include "dequantize-inl.h"
#include "formats-inl.h"
#include "gemm-inl.h"
#include "gemv-inl.h"
#include "isa/kernels.h"
#include "kv-inl.h"
#include "latent-inl.h"
#include "norm-inl.h"
#include "rope-inl.h"

namespace moespan {
namespace {

template <class Ops, class Format>
constexpr FormatKernels quantised() {
    return {Format::kType, Format::kBlock, sizeof(typename Format::Block), false, 4,
            gemv<Ops, Format>, gemm<Ops, Format>, Panel<Ops, Format>::bytes, dequantize<Ops, Format>};
}

template <class Ops, class Format>
constexpr FormatKernels floating() {
    return {Format::kType, 1, sizeof(typename Format::Element), true, 16,
            gemv_float<Ops, Format>, gemm_float<Ops, Format>, float_panel_bytes<Ops>, dequantize_float<Ops, Format>};
}

template <class Ops>
constexpr FormatKernels kFormats[] = {
    floating<Ops, F32<Ops>>(), floating<Ops, F16<Ops>>(), floating<Ops, BF16<Ops>>(),
    quantised<Ops, Q4_0<Ops>>(), quantised<Ops, Q4_1<Ops>>(), quantised<Ops, Q5_0<Ops>>(), quantised<Ops, Q5_1<Ops>>(), quantised<Ops, Q8_0<Ops>>(),
    quantised<Ops, Q4_K<Ops>>(), quantised<Ops, Q5_K<Ops>>(), quantised<Ops, Q6_K<Ops>>(),
};

template <class Ops>
constexpr KernelTable make_table(const char* name) {
    return {
        .name = name,
        .panel_rows = Ops::kLanes,
        .formats = kFormats<Ops>,
        .format_count = sizeof(kFormats<Ops>) / sizeof(kFormats<Ops>[0]),
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
    };
}

}  // namespace
}  // namespace moespan
