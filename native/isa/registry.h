// The instruction sets that the module was compiled for, and those of them that can run here, asked once.
#pragma once

#include <string>
#include <vector>

#include "isa/kernels.h"

namespace moespan {

// The names of all, and of those that can run here, best first; the last is "scalar".
std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();
// Those that the CPU has and the kernel refuses.
const std::vector<std::string>& refused_isas();

// The kernels of one instruction set; "" and "auto" mean the best. Throws std::invalid_argument with a sentence for any other name
// that is unknown or that cannot run here.
const KernelTable& kernels_for(const std::string& isa);

}  // namespace moespan
