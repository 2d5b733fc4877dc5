// Anonymous memory for weights: whole pages, huge ones where the kernel has them, so that a stream of many gigabytes costs few TLB misses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace moespan {

class Pages {
  public:
    Pages() = default;
    // Throws std::bad_alloc. Nothing is touched: a page comes into being on the node of the thread that first writes it, or on the one it is bound to.
    explicit Pages(size_t bytes);
    Pages(Pages&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Pages& operator=(Pages&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Pages();

    uint8_t* data() const { return data_; }

    // Has the pages come from the memory of one of the kernel's nodes (mbind, MPOL_BIND), before they are written. Returns 0 or an errno: some containers
    // do not let us.
    int bind(int node) const;

  private:
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
};

// Why pages cannot be bound to that node, in the system's words; empty where they can.
std::string bind_error(int node);

}  // namespace moespan
