// N pinned threads that run one body together, again and again: fork, work, join, some microseconds apart.
//
//   caller (thread 0) ── run(body) ──┬── body(worker 0) ──┬── join ── ...
//   workers 1 .. N-1 ── spin/park ───┴── body(worker i) ──┘
//
// An idle worker spins (first on `pause`, then on sched_yield, so that other threads of a small machine get their share) for spin_us and
// then parks on a futex, where it costs nothing. Nothing is allocated inside a run: layers reserve scratch before it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa/kernels.h"
#include "pool/buffer.h"

namespace moespan {

class Pool;

// The buffers that all threads of a run share. Each keeps what it holds until its next user asks for it, so what is alive at one time has slots of
// its own: an input is normed, or routed, before linear and ffn round it, and attention needs its pages and partials together.
enum class Shared {
    kNormed,    // layers/norm: a product's input behind its norm
    kInput,     // layers/linear, heads, ffn: their input as the kernels read it
    kHidden,    // layers/ffn: silu(gate) * up, likewise
    kGroups,    // layers/experts: the tokens of each expert
    kLogits,    // layers/route
    kPages,     // bindings/attention: a sequence's pages
    kPartials,  // layers/attention: the results of splits of the keys
    kAbsorbed,  // layers/latent: queries as latents
    kMixed,     // layers/latent: what they find, still latents
    kCount,
};

// What a body sees of the pool: the barrier, the next piece of work, and scratch of its own.
class Worker {
  public:
    Worker(Pool& pool, int index) : pool_(pool), index_(index) {}

    // Waits until every thread of the pool is here. What was written before is visible to all after.
    void barrier();

    // Calls work(i) for each i of 0 .. count - 1, each on whichever thread is free, so that a thread that lost its core for a while does
    // not hold up the others. At most once between two barriers (the run's start and end count), with the same count on each thread.
    template <class Work>
    void each(size_t count, const Work& work);

    // This thread's own scratch, as large as Pool::reserve_scratch asked for, 64-byte aligned.
    uint8_t* scratch();

  private:
    Pool& pool_;
    int index_;
};

class Pool {
  public:
    // Starts cpus.size() - 1 threads, pinned to cpus[1..]. Throws std::invalid_argument or std::system_error.
    Pool(const std::vector<int>& cpus, const KernelTable& kernels, int spin_us);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(cpus_.size()); }
    const KernelTable& kernels() const { return kernels_; }

    // Pins the calling thread to cpus[0].
    void pin_caller() const;

    // Runs body(worker) on every thread, the caller's among them, and returns when all are done. The body must not throw.
    template <class Body>
    void run(const Body& body) {
        run_erased([](const void* b, Worker& worker) noexcept { (*static_cast<const Body*>(b))(worker); }, &body);
    }

    // Grows every thread's scratch to at least `bytes`; called before a run, never within. Throws std::bad_alloc.
    void reserve_scratch(size_t bytes);

    // At least `bytes` of a shared buffer, 64-byte aligned. Throws std::bad_alloc.
    void* shared(Shared slot, size_t bytes) { return shared_[static_cast<size_t>(slot)].grow(bytes); }

  private:
    friend class Worker;
    using Task = void (*)(const void* body, Worker& worker) noexcept;

    void run_erased(Task task, const void* body);
    void stop();  // ends the workers
    void work_loop(int index);
    uint32_t wait_for_epoch(uint32_t seen);
    static void* thread_main(void* start);

    const std::vector<int> cpus_;
    const KernelTable& kernels_;
    const int64_t spin_ns_;
    std::vector<pthread_t> workers_;
    std::vector<Buffer> scratch_;
    Buffer shared_[static_cast<size_t>(Shared::kCount)];

    // Written by run_erased before the epoch moves, read by the workers after it.
    Task task_ = nullptr;
    const void* body_ = nullptr;
    bool stop_ = false;

    // Each on its own cache line: they are written at different moments by different threads.
    alignas(64) std::atomic<uint32_t> epoch_{0};    // moves when there is a new task; the futex
    alignas(64) std::atomic<int> parked_{0};        // workers in futex_wait, or on their way into it
    alignas(64) std::atomic<int> running_{0};       // workers that have not finished the task
    alignas(64) std::atomic<int> arrived_{0};       // threads at the barrier
    alignas(64) std::atomic<uint32_t> barriers_{0}; // moves when a barrier opens
    alignas(64) std::atomic<size_t> next_{0};       // the next piece of Worker::each
};

template <class Work>
void Worker::each(size_t count, const Work& work) {
    for (size_t i; (i = pool_.next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
}

}  // namespace moespan
