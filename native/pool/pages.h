// Anonymous memory for weights: whole pages, huge ones where the kernel has them, so that a stream of many gigabytes costs few TLB misses.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace moespan {

class Pages {
  public:
    Pages() = default;
    // Throws std::bad_alloc. Nothing is touched: a page comes into being on the node of the thread that first writes it.
    explicit Pages(size_t bytes) : bytes_(bytes) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<uint8_t*>(memory);
        madvise(data_, bytes, MADV_HUGEPAGE);  // refused where the kernel has none: then they are small
    }
    Pages(Pages&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Pages& operator=(Pages&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Pages() {
        if (data_ != nullptr) munmap(data_, bytes_);
    }

    uint8_t* data() const { return data_; }

  private:
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace moespan
