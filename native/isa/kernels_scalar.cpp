// The kernels compiled for baseline x86-64. CMakeLists.txt holds the flags of this file.
//
// No C++ standard library header may be included here, directly or not: an inline function compiled with these flags could be the copy
// that the linker keeps for the whole module. All kernel code is in anonymous namespaces for the same reason.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/ops_scalar.h"
#include "kernels/peak_scalar.h"
#include "kernels/table-inl.h"

namespace moespan {

constinit const KernelTable kScalarKernels = make_table<OpsScalar, PeakScalar>("scalar");

}  // namespace moespan
