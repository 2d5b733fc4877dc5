// Which instruction sets this CPU has and this kernel lets us use, asked once.
#pragma once

#include <string>
#include <vector>

namespace moespan {

struct KernelTable;

// Names of the instruction sets that can run here, best first: of "avx512", "avx2", "scalar".
// An instruction set counts only when CPUID lists it and XCR0 says that the kernel saves its registers.
const std::vector<std::string>& available_isas();

// The kernels of one instruction set; "" and "auto" mean the best. Throws std::invalid_argument with a sentence for any other name
// that is unknown or that this CPU lacks.
const KernelTable& kernels_for(const std::string& isa);

}  // namespace moespan
