#include "isa/bf16.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>
#include <vector>

namespace moespan {
namespace {

KernelTable joined(const KernelTable& base, const char* name, const Bf16Kernels& bf16) {
    KernelTable table = base;
    table.name = name;
    table.bf16 = &bf16;
    return table;
}

// The same with the peaks of the products among its peaks.
struct WithPeaks {
    std::vector<PeakLoop> peaks;
    KernelTable table;

    [[maybe_unused]] WithPeaks(const KernelTable& base, const char* name, const Bf16Kernels& bf16, std::initializer_list<PeakLoop> more)
        : peaks(base.peaks, base.peaks + base.peak_count), table(joined(base, name, bf16)) {
        peaks.insert(peaks.end(), more);
        table.peaks = peaks.data();
        table.peak_count = peaks.size();
    }
    WithPeaks(const WithPeaks&) = delete;
    WithPeaks& operator=(const WithPeaks&) = delete;
};

}  // namespace

const KernelTable* amx_kernels() {
#ifdef MOESPAN_AMX
    static const WithPeaks made(kAvx512VnniKernels, "amx", kAmxKernels, {kAmxPeakLoops[0], kAmxPeakLoops[1]});
    return &made.table;
#else
    return nullptr;
#endif
}

const KernelTable* avx512_bf16_kernels() {
    static const WithPeaks made(kAvx512VnniKernels, "avx512_bf16", kAvx512Bf16Kernels, {kAvx512Bf16PeakLoop});
    return &made.table;
}

const KernelTable& amx_emulated_kernels() {
    static const KernelTable table = joined(kScalarKernels, "amx_emulated", kAmxEmulatedKernels);
    return table;
}

bool request_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace moespan
