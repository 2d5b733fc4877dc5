// The kernels of AMX (tiles, bf16), which stand beside AVX-512's: isa/bf16.cpp joins them. CMakeLists.txt holds the flags of this file; AMX needs none,
// its instructions are written out.
//
// No C++ standard library header may be included here: see kernels_avx512.cpp.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/amx-inl.h"
#include "kernels/ops_amx.h"
#include "kernels/peak_amx.h"

namespace moespan {

constinit const Bf16Kernels kAmxKernels = make_bf16_kernels<OpsAmx>();
constinit const PeakLoop kAmxPeakLoops[2] = {kAmxPeaks[0], kAmxPeaks[1]};

}  // namespace moespan
