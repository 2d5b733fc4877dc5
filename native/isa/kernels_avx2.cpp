// The kernels compiled for AVX2, FMA and F16C. CMakeLists.txt holds the flags of this file.
//
// No C++ standard library header may be included here, directly or not: an inline function compiled with these flags could be the copy
// that the linker keeps for the whole module. All kernel code is in anonymous namespaces for the same reason.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/ops_avx2.h"
#include "kernels/peak_avx2.h"
#include "kernels/table-inl.h"

namespace moespan {

constinit const KernelTable kAvx2Kernels = make_table<OpsAvx2, PeakAvx2>("avx2");

}  // namespace moespan
