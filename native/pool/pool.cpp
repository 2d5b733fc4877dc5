#include "pool/pool.h"

#include <emmintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

namespace moespan {
namespace {

constexpr int kPauses = 1000;  // some 15-40 us of `pause` before the first sched_yield

// One turn of a spin loop.
class Spin {
  public:
    void once() {
        if (turns_ < kPauses) {
            ++turns_;
            _mm_pause();
        } else {
            sched_yield();
        }
    }

  private:
    int turns_ = 0;
};

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

void pin(pthread_t thread, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    const int error = pthread_setaffinity_np(thread, sizeof(set), &set);
    if (error != 0) throw std::system_error(error, std::generic_category(), "cannot pin a thread to CPU " + std::to_string(cpu));
}

void check_cpus(const std::vector<int>& cpus) {
    if (cpus.empty()) throw std::invalid_argument("a pool needs at least one CPU");
    for (int cpu : cpus) {
        if (cpu < 0 || cpu >= CPU_SETSIZE) throw std::invalid_argument("there is no CPU " + std::to_string(cpu));
    }
}

struct ThreadStart {
    Pool* pool;
    int index;
};

}  // namespace

Pool::Pool(const std::vector<int>& cpus, const KernelTable& kernels, int spin_us)
    : cpus_(cpus), kernels_(kernels), spin_ns_(int64_t{spin_us} * 1000) {
    check_cpus(cpus);
    scratch_.resize(cpus.size());
    workers_.reserve(cpus.size() - 1);
    try {
        for (int i = 1; i < threads(); ++i) {
            auto start = std::make_unique<ThreadStart>(ThreadStart{this, i});
            pthread_t thread;
            const int error = pthread_create(&thread, nullptr, thread_main, start.get());
            if (error != 0) throw std::system_error(error, std::generic_category(), "cannot start a pool thread");
            start.release();  // now thread_main's
            workers_.push_back(thread);
            pin(thread, cpus_[i]);
        }
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stop_ = true;
    epoch_.fetch_add(1);
    futex(epoch_, FUTEX_WAKE, INT_MAX);
    for (pthread_t worker : workers_) pthread_join(worker, nullptr);
}

void Pool::pin_caller() const { pin(pthread_self(), cpus_[0]); }

void Pool::reserve_scratch(size_t bytes) {
    for (Buffer& buffer : scratch_) buffer.grow(bytes);
}

void Pool::run_erased(Task task, const void* body) {
    task_ = task;
    body_ = body;
    next_.store(0, std::memory_order_relaxed);
    running_.store(threads() - 1, std::memory_order_relaxed);
    // Sequentially consistent with parked_ in wait_for_epoch: either the worker sees the new epoch, or we see that it parks.
    epoch_.fetch_add(1);
    if (parked_.load() > 0) futex(epoch_, FUTEX_WAKE, INT_MAX);

    Worker self(*this, 0);
    task(body, self);
    for (Spin spin; running_.load(std::memory_order_acquire) > 0;) spin.once();
}

void* Pool::thread_main(void* start) {
    const std::unique_ptr<ThreadStart> owned(static_cast<ThreadStart*>(start));
    char name[16];
    std::snprintf(name, sizeof(name), "moespan-%d", owned->index);
    pthread_setname_np(pthread_self(), name);
    owned->pool->work_loop(owned->index);
    return nullptr;
}

void Pool::work_loop(int index) {
    Worker self(*this, index);
    for (uint32_t epoch = 0;;) {
        epoch = wait_for_epoch(epoch);
        if (stop_) return;
        task_(body_, self);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

// Waits until the epoch is another than `seen`, and returns it.
uint32_t Pool::wait_for_epoch(uint32_t seen) {
    const int64_t deadline = now_ns() + spin_ns_;
    for (Spin spin; now_ns() < deadline; spin.once()) {
        const uint32_t epoch = epoch_.load(std::memory_order_acquire);
        if (epoch != seen) return epoch;
    }
    parked_.fetch_add(1);
    while (epoch_.load() == seen) futex(epoch_, FUTEX_WAIT, seen);
    parked_.fetch_sub(1);
    return epoch_.load(std::memory_order_acquire);
}

void Worker::barrier() {
    const uint32_t seen = pool_.barriers_.load(std::memory_order_relaxed);
    if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == pool_.threads()) {
        pool_.arrived_.store(0, std::memory_order_relaxed);
        pool_.next_.store(0, std::memory_order_relaxed);
        pool_.barriers_.fetch_add(1, std::memory_order_release);
        return;
    }
    for (Spin spin; pool_.barriers_.load(std::memory_order_acquire) == seen;) spin.once();
}

uint8_t* Worker::scratch() { return static_cast<uint8_t*>(pool_.scratch_[index_].data()); }

}  // namespace moespan
