#include "isa/cpu.h"

#include <cpuid.h>

namespace moespan {
namespace {

constexpr uint32_t kOsxsave = 1u << 27;  // leaf 1, ECX: xgetbv itself faults without it

uint64_t read_xcr0() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

bool covers(const Features& cpu, const Features& needs) {
    const auto has_all = [](uint64_t value, uint64_t bits) { return (value & bits) == bits; };
    return has_all(cpu.leaf1_ecx, needs.leaf1_ecx) && has_all(cpu.leaf7_ebx, needs.leaf7_ebx) && has_all(cpu.leaf7_ecx, needs.leaf7_ecx) &&
           has_all(cpu.leaf7_edx, needs.leaf7_edx) && has_all(cpu.leaf7_1_eax, needs.leaf7_1_eax) && has_all(cpu.xcr0, needs.xcr0);
}

}  // namespace

Features this_cpu() {
    Features f;
    uint32_t eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) f.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        f.leaf7_ebx = ebx;
        f.leaf7_ecx = ecx;
        f.leaf7_edx = edx;
    }
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) f.leaf7_1_eax = eax;
    if (f.leaf1_ecx & kOsxsave) f.xcr0 = read_xcr0();
    return f;
}

Choice choose(const Isa* isas, size_t count, const Features& cpu) {
    Choice choice;
    for (const Isa* isa = isas; isa < isas + count; ++isa) {
        if (isa->kernels == nullptr || !covers(cpu, isa->needs)) continue;
        if (isa->ready != nullptr && !isa->ready()) {
            choice.refused.emplace_back(isa->name);
        } else {
            choice.available.push_back(*isa);
        }
    }
    return choice;
}

}  // namespace moespan
