// Memory that grows and never shrinks: 64-byte aligned, so that a vector register or a cache line is never split at its start.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

namespace moespan {

class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // At least `bytes` of memory; what it held is lost when it grows. Throws std::bad_alloc.
    void* grow(size_t bytes) {
        if (bytes > bytes_) {
            const size_t unit = bytes < kHuge ? 64 : kHuge, rounded = (bytes + unit - 1) / unit * unit;
            void* larger = std::aligned_alloc(unit, rounded);
            if (larger == nullptr) throw std::bad_alloc();
            if (unit == kHuge) madvise(larger, rounded, MADV_HUGEPAGE);  // fewer entries of the TLB; without it things are slower, not wrong
            std::free(data_);
            data_ = larger;
            bytes_ = rounded;
        }
        return data_;
    }

    void* data() const { return data_; }

  private:
    static constexpr size_t kHuge = 2 << 20;  // a huge page

    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace moespan
