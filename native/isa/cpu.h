// What this CPU can do and what the kernel (the Linux one) lets a process use of it, and the choice that follows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moespan {

struct KernelTable;

// Bits of CPUID (Intel SDM vol. 2A) and of XCR0, which says whose registers the kernel saves: all that a CPU has, or what is needed of it.
struct Features {
    uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0;  // leaf 7: subleaf 0, and subleaf 1
    uint64_t xcr0 = 0;
};

// One instruction set: what it needs, and what was compiled for it.
struct Isa {
    const char* name;
    Features needs;
    const KernelTable* kernels;  // null where the compiler was too old for them
    bool (*ready)();  // asks the kernel for what it gives only when asked, and tells whether it was given; null where CPUID and XCR0 say it all
};

struct Choice {
    std::vector<Isa> available;         // in the registry's order
    std::vector<std::string> refused;  // the CPU has them, and the kernel refuses their use
};

Features this_cpu();

// Which of the `count` instruction sets a CPU with those features can run. `ready` is asked only where the features are there.
Choice choose(const Isa* isas, size_t count, const Features& cpu);

}  // namespace moespan
