// The table of instruction sets. To add one: its translation unit kernels_NAME.cpp with its flags in CMakeLists.txt, its KernelTable in
// kernels.h, and a line here.
//
// Float weights (F32, F16, BF16) are widened to float32 and multiplied there by every one of them, with activations as they come. "amx" and "avx512_bf16"
// are "avx512_vnni" with products of bf16 beside (isa/bf16.cpp), for many tokens and all weights but F32.
#include "isa/registry.h"

#include <iterator>
#include <stdexcept>

#include "isa/bf16.h"
#include "isa/cpu.h"

namespace moespan {
namespace {

constexpr uint64_t kXcr0Avx = 0x6, kXcr0Avx512 = 0xe6;  // SSE and AVX; the opmasks and both halves of the zmm registers as well

// What both of them need.
constexpr Features operator|(const Features& a, const Features& b) {
    return {a.leaf1_ecx | b.leaf1_ecx, a.leaf7_ebx | b.leaf7_ebx, a.leaf7_ecx | b.leaf7_ecx, a.leaf7_edx | b.leaf7_edx, a.leaf7_1_eax | b.leaf7_1_eax, a.xcr0 | b.xcr0};
}

constexpr Features kAvx2{
    .leaf1_ecx = 1u << 12 | 1u << 28 | 1u << 29,  // FMA, AVX, F16C
    .leaf7_ebx = 1u << 5,
    .xcr0 = kXcr0Avx,
};
constexpr Features kAvx512 = kAvx2 | Features{.leaf7_ebx = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, .xcr0 = kXcr0Avx512};  // F, DQ, BW, VL
constexpr Features kAvx512Vnni = kAvx512 | Features{.leaf7_ecx = 1u << 11};
constexpr Features kAvx512Bf16 = kAvx512Vnni | Features{.leaf7_1_eax = 1u << 5};
constexpr Features kAmx = kAvx512Bf16 | Features{
                                            .leaf7_edx = 1u << 22 | 1u << 23 | 1u << 24,  // AMX-BF16, AVX512-FP16, AMX-TILE
                                            .xcr0 = 3u << 17,                             // the tiles' configuration and data
                                        };

// Best first.
const Isa kIsas[] = {
    {"amx", kAmx, amx_kernels(), request_tiles},
    {"avx512_vnni", kAvx512Vnni, &kAvx512VnniKernels, nullptr},
    {"avx512_bf16", kAvx512Bf16, avx512_bf16_kernels(), nullptr},  // finer than VNNI for many tokens, and slower: for who asks for it
    {"avx512", kAvx512, &kAvx512Kernels, nullptr},
    {"avx2", kAvx2, &kAvx2Kernels, nullptr},
    {"scalar", {}, &kScalarKernels, nullptr},
};

const Choice& choice() {
    static const Choice made = choose(kIsas, std::size(kIsas), this_cpu());
    return made;
}

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

}  // namespace

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) {
        if (isa.kernels != nullptr) names.emplace_back(isa.name);
    }
    return names;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : choice().available) names.emplace_back(isa.name);
    return names;
}

const std::vector<std::string>& refused_isas() { return choice().refused; }

const KernelTable& kernels_for(const std::string& isa) {
    if (isa.empty() || isa == "auto") return *choice().available.front().kernels;
    for (const Isa& here : choice().available) {
        if (here.name == isa) return *here.kernels;
    }
    if (isa == amx_emulated_kernels().name) return amx_emulated_kernels();  // for tests: it is slow, and never chosen
    throw std::invalid_argument("The instruction set '" + isa + "' cannot run on this CPU. Available: " + joined(available_isas()) + ".");
}

}  // namespace moespan
