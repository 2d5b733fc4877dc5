#include "isa/cpu.h"

#include <cpuid.h>

#include <cstdint>
#include <stdexcept>

#include "isa/kernels.h"

namespace moespan {
namespace {

// Intel SDM vol. 2A, CPUID: leaf 1 ECX, and leaf 7 subleaf 0 EBX and ECX.
constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
constexpr uint32_t kAvx2 = 1u << 5, kAvx512F = 1u << 16, kAvx512Dq = 1u << 17, kAvx512Bw = 1u << 30, kAvx512Vl = 1u << 31;
constexpr uint32_t kAvx512Vnni = 1u << 11;
// XCR0: the state that the operating system saves. SSE and AVX; opmask and both halves of the zmm registers.
constexpr uint64_t kXcr0Avx = 0x6, kXcr0Avx512 = 0xe6;

struct Features {
    uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0;
    uint64_t xcr0 = 0;
};

bool has_all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

Features read_features() {
    Features f;
    uint32_t eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) f.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        f.leaf7_ebx = ebx;
        f.leaf7_ecx = ecx;
    }
    if (f.leaf1_ecx & kOsxsave) {  // xgetbv itself faults without it
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        f.xcr0 = (uint64_t{high} << 32) | low;
    }
    return f;
}

std::vector<std::string> detect() {
    const Features f = read_features();
    const bool avx2 = has_all(f.leaf1_ecx, kFma | kAvx | kF16c) && has_all(f.leaf7_ebx, kAvx2) && has_all(f.xcr0, kXcr0Avx);
    const bool avx512 = avx2 && has_all(f.leaf7_ebx, kAvx512F | kAvx512Dq | kAvx512Bw | kAvx512Vl) && has_all(f.leaf7_ecx, kAvx512Vnni) &&
                        has_all(f.xcr0, kXcr0Avx512);
    std::vector<std::string> names;
    if (avx512) names.emplace_back("avx512");
    if (avx2) names.emplace_back("avx2");
    names.emplace_back("scalar");
    return names;
}

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

}  // namespace

const std::vector<std::string>& available_isas() {
    static const std::vector<std::string> names = detect();
    return names;
}

const KernelTable& kernels_for(const std::string& isa) {
    const std::string wanted = isa.empty() || isa == "auto" ? available_isas().front() : isa;
    for (const std::string& name : available_isas()) {
        if (name != wanted) continue;
        if (name == "avx512") return kAvx512Kernels;
        if (name == "avx2") return kAvx2Kernels;
        return kScalarKernels;
    }
    throw std::invalid_argument("The instruction set '" + isa + "' cannot run on this CPU. Available: " + joined(available_isas()) + ".");
}

}  // namespace moespan
