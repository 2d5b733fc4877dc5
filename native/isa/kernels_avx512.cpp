// The kernels compiled for AVX-512 F, BW, DQ and VL. CMakeLists.txt holds the flags of this file.
//
// No C++ standard library header may be included here, directly or not: an inline function compiled with these flags could be the copy
// that the linker keeps for the whole module. All kernel code is in anonymous namespaces for the same reason.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/ops_avx512.h"
#include "kernels/peak_avx512.h"
#include "kernels/table-inl.h"

namespace moespan {

constinit const KernelTable kAvx512Kernels = make_table<OpsAvx512, PeakAvx512>("avx512");

}  // namespace moespan
