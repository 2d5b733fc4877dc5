#include "pool/pages.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <system_error>

namespace moespan {
namespace {

constexpr int kMostNodes = 1024;  // that the kernel can be built for
constexpr size_t kWordBits = 8 * sizeof(unsigned long);

}  // namespace

Pages::Pages(size_t bytes) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(memory);
    madvise(data_, bytes, MADV_HUGEPAGE);  // refused where the kernel has none: then they are small
}

Pages::~Pages() {
    if (data_ != nullptr) munmap(data_, bytes_);
}

int Pages::bind(int node) const {
    if (node < 0 || node >= kMostNodes) return EINVAL;
    unsigned long mask[kMostNodes / kWordBits] = {};
    mask[static_cast<size_t>(node) / kWordBits] = 1ul << static_cast<size_t>(node) % kWordBits;
    // The C library has no such call (libnuma has). The kernel takes the number of bits and one.
    return syscall(SYS_mbind, data_, bytes_, MPOL_BIND, mask, kMostNodes + 1, 0) == 0 ? 0 : errno;
}

std::string bind_error(int node) {
    const int error = Pages(static_cast<size_t>(sysconf(_SC_PAGESIZE))).bind(node);
    return error == 0 ? "" : std::generic_category().message(error);
}

}  // namespace moespan
