// The products of AVX-512's BF16, which stand beside the kernels of VNNI: isa/bf16.cpp joins them. CMakeLists.txt holds the flags of this file.
//
// No C++ standard library header may be included here: see kernels_avx512.cpp.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/amx-inl.h"
#include "kernels/ops_avx512_bf16.h"
#include "kernels/peak_avx512_bf16.h"

namespace moespan {

constinit const Bf16Kernels kAvx512Bf16Kernels = make_bf16_kernels<OpsAvx512Bf16>();
constinit const PeakLoop kAvx512Bf16PeakLoop = kAvx512Bf16Peak;

}  // namespace moespan
