// Which of some made-up instruction sets are chosen on made-up CPUs: a line for each CPU, which test_isa.py reads.
#include <cstdio>
#include <iterator>

#include "isa/cpu.h"
#include "isa/kernels.h"

namespace {

bool granted = false;
int asked = 0;

bool ask() {
    ++asked;
    return granted;
}

constexpr moespan::Features kWide{.leaf1_ecx = 3, .xcr0 = 6};
constexpr moespan::Features kTiles{.leaf1_ecx = 3, .leaf7_ebx = 1u << 31, .leaf7_ecx = 4, .leaf7_edx = 8, .leaf7_1_eax = 32, .xcr0 = uint64_t{1} << 40 | 6};
constexpr moespan::KernelTable kKernels{};
constexpr moespan::Isa kIsas[] = {
    {"not compiled", {}, nullptr, ask},
    {"tiles", kTiles, &kKernels, ask},
    {"wide", kWide, &kKernels, nullptr},
    {"plain", {}, &kKernels, nullptr},
};

void tell(const char* cpu, const moespan::Features& features) {
    asked = 0;
    const moespan::Choice choice = moespan::choose(kIsas, std::size(kIsas), features);
    std::printf("%s:", cpu);
    for (const moespan::Isa& isa : choice.available) std::printf(" %s", isa.name);
    for (const std::string& name : choice.refused) std::printf(" -%s", name.c_str());
    std::printf(", asked %d\n", asked);
}

}  // namespace

int main() {
    tell("bare", {});
    tell("half", {.leaf1_ecx = 2, .xcr0 = 6});
    tell("not saved", {.leaf1_ecx = 3, .xcr0 = 2});
    tell("wide and more", {.leaf1_ecx = 7, .leaf7_ebx = 1, .xcr0 = 7});
    using F = moespan::Features;
    for (uint32_t F::* word : {&F::leaf7_ebx, &F::leaf7_ecx, &F::leaf7_edx, &F::leaf7_1_eax}) {
        moespan::Features lacking = kTiles;
        lacking.*word = 0;
        tell("no tiles", lacking);
    }
    tell("refused", kTiles);
    granted = true;
    tell("granted", kTiles);
}
