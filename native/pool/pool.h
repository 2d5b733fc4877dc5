// N pinned threads that share out pieces of work, again and again: fork, work, join, some microseconds apart.
//
//   caller (thread 0) ── each(count, work) ──┬── takes pieces ──┬── join ── ...
//   workers 1 .. N-1 ───── spin/park ────────┴── take pieces ───┘
//
// A thread takes its next piece before it works on the one it has, so that it can fetch from memory what it is going to read (Seat::next). It does not
// where few pieces are left, nor before a nap, lest others wait for one that nobody works on.
//
// The join counts finished pieces and not threads: a thread that has no core at the moment is not waited for unless it lost it within a piece.
// Whoever comes late finds no piece left and touches nothing of the run, nor of a later one.
//
// To lose the core within a piece costs everyone a slice of the scheduler's time, some milliseconds. Who finds that it happened (Thread::lost_core):
//
//   a worker    works in stints for a while, 10 ms at first and up to a second when it happens again: half a millisecond of pieces, then as long a nap.
//               Giving way by itself, between pieces, it is hardly ever stopped within one. (sched_yield would not do: it gives way only to threads of the
//               same group of the scheduler, and a program in another container or terminal is in another one.)
//   the caller  cannot leave, for it drives the step. It changes places with a worker of its node whose core is less crowded, so that thread i need not stay on
//               cpus[i]; each CPU keeps one thread.
//
// Threads may belong to several nodes of memory. A run's pieces are then anyone's as ever, or each node's own (each_at_home), where the weights that a
// piece reads lie on its node: only that node's threads take it, from a counter of their own.
//
// What the threads did is counted for those who watch the server, from readings of the clock that are taken anyway: see busy_ns and bytes_read.
//
// An idle worker spins (first on `pause`, then on sched_yield) for spin_us and then parks on a futex, where it costs nothing. Nothing is allocated
// while pieces are worked on: layers reserve scratch before.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "isa/kernels.h"
#include "pool/buffer.h"

namespace moespan {

constexpr size_t kMaxNodes = 16;

// The buffers that all threads of a run share. Each keeps what it holds until its next user asks for it, so what is alive at one time has slots of
// its own: an input is normed, or routed, before linear and ffn round it, and attention needs its pages and partials together.
enum class Shared {
    kNormed,    // layers/norm: a product's input behind its norm
    kInput,     // layers/linear, heads, ffn: their input as the kernels read it
    kGroups,    // layers/experts: the tokens of each expert
    kCuts,      // layers/ffn: how gate and up are cut
    kNodeSums,  // layers/ffn: what each node's slices add to the output
    kLogits,    // layers/route
    kPages,     // bindings/attention: a sequence's pages
    kPartials,  // layers/attention: the results of splits of the keys
    kAbsorbed,  // layers/latent: queries as latents
    kMixed,     // layers/latent: what they find, still latents
    kHidden,    // layers/ffn: silu(gate) * up as the kernels read it; one for each node, from here on
    kCount = kHidden + kMaxNodes,
};

// Weights that layers read, by what they are.
enum class Weights { kExperts, kDense, kCount };

// Where a piece is worked on: the thread's own scratch, and its node, which counts from 0. `next` is the piece that this thread works on behind it, if one
// of the run's; near the run's end, when that is not known yet, the one that would be if threads kept step.
struct Seat {
    uint8_t* scratch;
    size_t node, next;
};

class Pool {
  public:
    // Starts cpus.size() - 1 threads, pinned to cpus[1..]; nodes[i] is the node of cpus[i], 0 for all without. Throws std::invalid_argument or
    // std::system_error.
    Pool(const std::vector<int>& cpus, const KernelTable& kernels, int spin_us, const std::vector<size_t>& nodes = {});
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(cpus_.size()); }
    const KernelTable& kernels() const { return kernels_; }

    // The pool's own TileKernels::gemm_from of a type (layers/crossover.h); never set while a run goes on.
    bool knows_crossover(uint32_t type_id) const;
    void set_crossover(uint32_t type_id, size_t gemm_from);

    // Nodes, at most kMaxNodes, and the threads of one, at least 1.
    size_t nodes() const { return node_threads_.size(); }
    size_t threads_of(size_t node) const { return node_threads_[node]; }

    // Pins the calling thread to cpus[0], as the one that is going to call each. It may change places with a worker later.
    void pin_caller();

    // Calls work(i, scratch) for each i of 0 .. count - 1, taken in this order by whichever thread is free, and returns when all are done: what they
    // wrote is visible to the caller, and to the pieces of the next call. scratch is the thread's own, as large as reserve_scratch asked for and
    // 64-byte aligned. work must not throw. One thread at a time may call, and work must not.
    template <class Work>
    void each(size_t count, const Work& work) {
        each_seated(count, [&work](size_t i, const Seat& seat) { work(i, seat.scratch); });
    }

    // The same with work(i, seat): who reads what each node has a copy of takes its own.
    template <class Work>
    void each_seated(size_t count, const Work& work) {
        if (count > 1) return run(task_of<Work>, &work, count);
        for (size_t i = 0; i < count; ++i) work(i, seat(0, i + 1));
    }

    // The same for pieces that each belong to a node: work(i, seat) for each i of 0 .. counts[node] - 1, on threads of that node alone.
    template <class Work>
    void each_at_home(const size_t* counts, const Work& work) {
        if (nodes() == 1) return each_seated(counts[0], work);
        run_at_home(task_of<Work>, &work, counts);
    }

    // The same on the calling thread alone.
    template <class Work>
    void each_here(size_t count, const Work& work) {
        for (size_t i = 0; i < count; ++i) work(i, scratch(0));
    }

    // Grows every thread's scratch to at least `bytes`; called before a run, never within. Throws std::bad_alloc.
    void reserve_scratch(size_t bytes);

    // At least `bytes` of a shared buffer, 64-byte aligned. Throws std::bad_alloc.
    void* shared(Shared slot, size_t bytes) { return shared_[static_cast<size_t>(slot)].grow(bytes); }

    // Nanoseconds that all threads together have worked on pieces of runs since the start, waiting and spinning apart. Any thread may ask.
    int64_t busy_ns() const;

    // Bytes of weights that the layers have read from memory since the start; a layer counts each of its matrices once a call. Any thread may ask.
    uint64_t bytes_read(Weights kind) const { return bytes_read_[static_cast<size_t>(kind)].load(std::memory_order_relaxed); }
    void count_read(Weights kind, size_t bytes) {
        auto& sum = bytes_read_[static_cast<size_t>(kind)];
        sum.store(sum.load(std::memory_order_relaxed) + bytes, std::memory_order_relaxed);  // the calling thread alone writes
    }

  private:
    using Task = void (*)(const void* work, size_t i, const Seat& seat) noexcept;
    template <class Work>
    static void task_of(const void* work, size_t i, const Seat& seat) noexcept {
        (*static_cast<const Work*>(work))(i, seat);
    }
    struct Thread;  // what one of the threads knows of itself

    // The pieces of a node that no one has taken, of `count` in a run.
    struct alignas(64) Home {
        std::atomic<uint32_t> left{0};
        uint32_t count = 0;
    };

    void run(Task task, const void* work, size_t count);
    void run_alone(Task task, const void* work, size_t count);
    void run_at_home(Task task, const void* work, const size_t* counts);
    void open(Task task, const void* work, size_t pieces);
    void work_and_join(uint32_t left);
    bool has_work(uint32_t left, const Thread& self) const;
    bool take(Thread& self, size_t& piece);
    bool take_new(const Thread& self, size_t& piece, size_t rounds);
    static bool take_one(std::atomic<uint32_t>& from, uint32_t& left, size_t least);
    void work_on(size_t piece, Thread& self);
    size_t next_of(size_t piece, Thread& self);
    bool drive();
    bool join();
    void change_places();

    void start(Thread& worker);
    void stop();  // ends the workers
    static void* thread_main(void* worker);
    bool wait_for_work(Thread& self);
    void help(Thread& self);
    void idle(Thread& self, int64_t begin);
    void park();
    uint8_t* scratch(size_t thread) const { return static_cast<uint8_t*>(scratch_[thread].data()); }
    Seat seat(size_t thread, size_t next) const { return {scratch(thread), nodes_[thread], next}; }

    std::vector<int> cpus_;             // of each thread
    std::vector<size_t> nodes_;         // of each thread
    std::vector<size_t> node_threads_;  // threads of each node
    std::vector<FormatKernels> formats_;  // kernels_'s, with the pool's crossovers
    KernelTable kernels_;
    std::vector<uint32_t> crossovers_known_;  // types
    const int64_t spin_ns_;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<Buffer> scratch_;
    Buffer shared_[static_cast<size_t>(Shared::kCount)];
    std::atomic<uint64_t> bytes_read_[static_cast<size_t>(Weights::kCount)]{};
    size_t started_ = 0;  // workers
    bool caller_pinned_ = false;

    // The run. Written by the caller before left_ (or a node's `left`) rises from 0, and not again before unfinished_ is back at 0. A thread reads them
    // only while it has a piece, and so while they stand still.
    Task task_ = nullptr;
    const void* work_ = nullptr;
    uint32_t count_ = 0;
    std::vector<Home> homes_;  // of each node

    // Each on its own cache line: they are written at different moments by different threads.
    alignas(64) std::atomic<uint32_t> left_{0};        // pieces that no one has taken; the futex
    alignas(64) std::atomic<uint32_t> unfinished_{0};  // pieces that are not done
    alignas(64) std::atomic<int> parked_{0};           // workers in futex_wait, or on their way into it
};

}  // namespace moespan
