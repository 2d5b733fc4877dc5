// Kernel tables with bf16 products beside another instruction set's kernels.
#pragma once

#include "isa/kernels.h"

namespace moespan {

// Null where the compiler was too old for AMX.
const KernelTable* amx_kernels();
const KernelTable* avx512_bf16_kernels();
const KernelTable& amx_emulated_kernels();

// Asks Linux, once, to let this process use the tile registers (arch_prctl(2), since 5.16); false when it refuses or is older.
bool request_tiles();

}  // namespace moespan
