// AMX emulated in plain C++: its body, its packing and its tails run anywhere, sanitisers included.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/amx-inl.h"
#include "kernels/ops_amx_scalar.h"

namespace moespan {

constinit const Bf16Kernels kAmxEmulatedKernels = make_bf16_kernels<OpsAmxScalar>();

}  // namespace moespan
