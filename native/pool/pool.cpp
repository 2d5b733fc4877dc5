#include "pool/pool.h"

#include <emmintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <climits>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace moespan {
namespace {

constexpr uint32_t kStop = UINT32_MAX;    // in left_: the workers end
constexpr uint32_t kAtHome = kStop - 1;   // in left_: the pieces are in homes_
constexpr size_t kAheadRounds = 2;        // pieces for each thread that must be left when one is taken ahead
constexpr int kJoinPauses = 1000;         // some 15-40 us of `pause` before the caller's first sched_yield
constexpr int64_t kPauseNs = 30'000;      // the same for an idle worker
constexpr int64_t kTakenNs = 200'000;     // a core that was away for so long was another program's, and not the kernel's own for a moment
constexpr int64_t kSliceNs = 1'000'000;   // another program that has work for so long has work for more
constexpr int64_t kReadingNs = 500'000;   // how old a reading of both clocks may be before a piece
constexpr int64_t kStintNs = 500'000;     // on a crowded core: less than any slice that the scheduler gives (from 1.4 ms), so that none ends in a stint
constexpr int64_t kNapNs = 500'000;       // as long: half of the core is what is ours
constexpr int64_t kFirstCrowdNs = 10'000'000, kLongestCrowdNs = 1'000'000'000;

int64_t clock_ns(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

int64_t now_ns() { return clock_ns(CLOCK_MONOTONIC); }

long involuntary_switches() {
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nivcsw;
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

int try_pin(pthread_t thread, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return pthread_setaffinity_np(thread, sizeof(set), &set);
}

void pin(pthread_t thread, int cpu) {
    const int error = try_pin(thread, cpu);
    if (error != 0) throw std::system_error(error, std::generic_category(), "cannot pin a thread to CPU " + std::to_string(cpu));
}

void check_cpus(const std::vector<int>& cpus, const std::vector<size_t>& nodes) {
    if (cpus.empty()) throw std::invalid_argument("a pool needs at least one CPU");
    for (int cpu : cpus) {
        if (cpu < 0 || cpu >= CPU_SETSIZE) throw std::invalid_argument("there is no CPU " + std::to_string(cpu));
    }
    if (!nodes.empty() && nodes.size() != cpus.size()) throw std::invalid_argument("each CPU needs a node");
}

// How many threads each node has: every one up to the largest must have some.
std::vector<size_t> count_threads(const std::vector<size_t>& nodes) {
    const size_t largest = *std::max_element(nodes.begin(), nodes.end());
    if (largest >= kMaxNodes) {
        throw std::invalid_argument("node " + std::to_string(largest) + ", but at most " + std::to_string(kMaxNodes) + " nodes are supported");
    }
    std::vector<size_t> counts(largest + 1, 0);
    for (size_t node : nodes) ++counts[node];
    const auto idle = std::find(counts.begin(), counts.end(), size_t{0});
    if (idle != counts.end()) throw std::invalid_argument("node " + std::to_string(idle - counts.begin()) + " has no thread");
    return counts;
}

}  // namespace

// What a thread knows of its core. On cache lines of its own: but for the atomic fields, only the thread itself reads and writes here once it runs.
struct alignas(64) Pool::Thread {
    Thread(Pool& p, size_t i) : pool(p), index(i), node(p.nodes_[i]) {}

    // Before and after a piece. lost_core tells whether another program had the core for a while since the last reading of the clocks: time passed
    // that this thread did not get, and not because it waited itself (for a page of the file, say).
    void begin_piece() {
        seen = now_ns();
        if (seen - wall > kReadingNs) read_clocks();
    }
    bool lost_core() {
        const int64_t begun = seen;
        seen = now_ns();
        busy_ns.store(busy_ns.load(std::memory_order_relaxed) + seen - begun, std::memory_order_relaxed);  // nobody else writes it
        if (seen - begun < kTakenNs) return false;
        const int64_t away = (seen - wall) - (clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu);
        const long before = switches;
        read_clocks();
        return away > kTakenNs && switches > before;
    }
    void read_clocks() {
        wall = seen;
        cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
        switches = involuntary_switches();
    }

    // Another program took the core: within a piece, so that everyone waited for it, or for long enough between two, so that it will.
    void crowd() {
        const int64_t before = level(seen), ns = before == 0 ? kFirstCrowdNs : std::min(2 * before, kLongestCrowdNs);
        crowd_ns.store(ns, std::memory_order_relaxed);
        crowded_until.store(seen + ns, std::memory_order_relaxed);
    }
    bool crowded() const { return seen < crowded_until.load(std::memory_order_relaxed); }

    // How badly crowded the core is, 0 when it was left alone for a while.
    int64_t level(int64_t now) const {
        return now < crowded_until.load(std::memory_order_relaxed) + kFirstCrowdNs ? crowd_ns.load(std::memory_order_relaxed) : 0;
    }

    // The piece that it took ahead, if it did.
    bool holds_piece() const { return next != kNone; }

    bool nap_is_due() const { return index > 0 && crowded() && seen - rested >= kStintNs; }  // the caller cannot leave
    // For a worker that holds no piece.
    void nap_when_due() {
        if (!nap_is_due()) return;
        const timespec nap{0, kNapNs};
        nanosleep(&nap, nullptr);
        seen = rested = now_ns();
        wall = 0;  // what passed is no loss
    }
    void look_at_clock() {
        const int64_t away = now_ns() - seen;
        seen += away;
        if (away > kSliceNs) crowd();
    }
    void yield() {
        sched_yield();
        look_at_clock();
        rested = seen;
        wall = 0;
    }

    Pool& pool;
    const size_t index, node;
    static constexpr size_t kNone = SIZE_MAX;
    size_t next = kNone;
    pthread_t handle{};
    int64_t seen = 0;  // the time, when it last looked
    int64_t wall = 0, cpu = 0;
    long switches = 0;                        // with wall and cpu: the last reading
    int64_t rested = 0;                       // when it last gave its core up
    // Until when it works in stints, and how long that is from the loss on. They belong to the core: the caller exchanges them with the CPU.
    std::atomic<int64_t> crowded_until{0}, crowd_ns{0};
    std::atomic<int64_t> busy_ns{0};  // on pieces
};

Pool::Pool(const std::vector<int>& cpus, const KernelTable& kernels, int spin_us, const std::vector<size_t>& nodes)
    : cpus_(cpus), formats_(kernels.formats, kernels.formats + kernels.format_count), kernels_(kernels), spin_ns_(int64_t{spin_us} * 1000) {
    kernels_.formats = formats_.data();
    check_cpus(cpus, nodes);
    nodes_ = nodes.empty() ? std::vector<size_t>(cpus.size(), 0) : nodes;
    node_threads_ = count_threads(nodes_);
    homes_ = std::vector<Home>(node_threads_.size());
    scratch_.resize(cpus.size());
    threads_.reserve(cpus.size());
    for (size_t i = 0; i < cpus.size(); ++i) threads_.emplace_back(new Thread(*this, i));
    try {
        for (size_t i = 1; i < cpus.size(); ++i) start(*threads_[i]);
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::start(Thread& worker) {
    pthread_t handle;
    const int error = pthread_create(&handle, nullptr, thread_main, &worker);
    if (error != 0) throw std::system_error(error, std::generic_category(), "cannot start a pool thread");
    worker.handle = handle;
    ++started_;
    char name[16];
    std::snprintf(name, sizeof(name), "moespan-%zu", worker.index);
    pthread_setname_np(handle, name);
    pin(handle, cpus_[worker.index]);
}

void Pool::stop() {
    left_.store(kStop);
    futex(left_, FUTEX_WAKE, INT_MAX);
    for (size_t i = 1; i <= started_; ++i) pthread_join(threads_[i]->handle, nullptr);
}

bool Pool::knows_crossover(uint32_t type_id) const {
    return std::find(crossovers_known_.begin(), crossovers_known_.end(), type_id) != crossovers_known_.end();
}

void Pool::set_crossover(uint32_t type_id, size_t gemm_from) {
    const auto format = std::find_if(formats_.begin(), formats_.end(), [&](const FormatKernels& f) { return f.type_id == type_id; });
    format->tiles.gemm_from = gemm_from;
    crossovers_known_.push_back(type_id);
}

void Pool::pin_caller() {
    pin(pthread_self(), cpus_[0]);
    threads_[0]->handle = pthread_self();
    caller_pinned_ = true;
}

void Pool::reserve_scratch(size_t bytes) {
    for (Buffer& buffer : scratch_) buffer.grow(bytes);
}

int64_t Pool::busy_ns() const {
    int64_t sum = 0;
    for (const auto& thread : threads_) sum += thread->busy_ns.load(std::memory_order_relaxed);
    return sum;
}

void Pool::run(Task task, const void* work, size_t count) {
    if (threads() == 1) return run_alone(task, work, count);
    open(task, work, count);
    count_ = static_cast<uint32_t>(count);
    work_and_join(count_);
}

// Nobody else could help.
void Pool::run_alone(Task task, const void* work, size_t count) {
    Thread& self = *threads_[0];
    self.begin_piece();
    for (size_t i = 0; i < count; ++i) task(work, i, seat(0, i + 1));
    self.lost_core();
}

void Pool::run_at_home(Task task, const void* work, const size_t* counts) {
    size_t pieces = 0;
    for (size_t node = 0; node < nodes(); ++node) pieces += counts[node];
    if (pieces == 0) return;
    open(task, work, pieces);
    for (size_t node = 0; node < nodes(); ++node) homes_[node].count = static_cast<uint32_t>(counts[node]);
    // As below: a thread that looked for work here in an earlier run may take a piece before it is called.
    for (Home& home : homes_) home.left.store(home.count, std::memory_order_release);
    work_and_join(kAtHome);
    left_.store(0, std::memory_order_relaxed);
}

// What is to be done, before anyone can take a piece of it.
void Pool::open(Task task, const void* work, size_t pieces) {
    assert(pieces < kAtHome);
    task_ = task;
    work_ = work;
    unfinished_.store(static_cast<uint32_t>(pieces), std::memory_order_relaxed);
}

void Pool::work_and_join(uint32_t left) {
    // Opens the run: who takes a piece sees all of the above (take is an acquire). Sequentially consistent with parked_ in park: either the worker
    // sees that there is work, or we see that it parks.
    left_.store(left);
    if (parked_.load() > 0) futex(left_, FUTEX_WAKE, INT_MAX);

    const bool lost_piece = drive(), lost_wait = join();
    if ((lost_piece || lost_wait) && caller_pinned_ && pthread_equal(threads_[0]->handle, pthread_self())) change_places();
}

// Waits until all pieces are done. Returns whether another program had the core for long, which this thread offers when it has waited for some time: the
// last piece may be with a worker that shares it.
bool Pool::join() {
    bool lost = false;
    // An acquire, of all the releases in work_on: each decrement continues the release sequence of the ones before.
    for (int turn = 0; unfinished_.load(std::memory_order_acquire) > 0; ++turn) {
        if (turn < kJoinPauses) {
            _mm_pause();
            continue;
        }
        const int64_t begin = now_ns();
        sched_yield();
        lost |= now_ns() - begin > kSliceNs;
    }
    return lost;
}

// Whether there is anything for this thread, where left_ is `left`.
bool Pool::has_work(uint32_t left, const Thread& self) const {
    return left != kAtHome ? left != 0 : homes_[self.node].left.load(std::memory_order_relaxed) != 0;
}

// Takes a piece, if there is one for this thread.
bool Pool::take(Thread& self, size_t& piece) {
    if (!self.holds_piece()) return take_new(self, piece, 0);
    piece = std::exchange(self.next, Thread::kNone);
    return true;
}

// Takes one that nobody has, where so many are left for each of the threads that may take them, and one more.
bool Pool::take_new(const Thread& self, size_t& piece, size_t rounds) {
    uint32_t left = 0;
    if (take_one(left_, left, rounds * cpus_.size())) {
        piece = count_ - left;
        return true;
    }
    if (left != kAtHome) return false;
    Home& home = homes_[self.node];
    if (!take_one(home.left, left, rounds * node_threads_[self.node])) return false;
    piece = home.count - left;
    return true;
}

// One of those that are `left`, if they are more than `least`. Only what `from` holds at this instant counts: a thread that went to sleep with an old value
// in its hands may win the exchange in a later run, and then has a piece of that one, whose task it reads after this acquire.
bool Pool::take_one(std::atomic<uint32_t>& from, uint32_t& left, size_t least) {
    left = from.load(std::memory_order_relaxed);
    do {
        if (left <= least || left >= kAtHome) return false;
    } while (!from.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed));
    return true;
}

void Pool::work_on(size_t piece, Thread& self) {
    task_(work_, piece, seat(self.index, next_of(piece, self)));
    unfinished_.fetch_sub(1, std::memory_order_release);
}

// The piece behind this one, taken if it can be, but not before a nap.
size_t Pool::next_of(size_t piece, Thread& self) {
    if (!self.nap_is_due() && take_new(self, self.next, kAheadRounds)) return self.next;
    const bool at_home = left_.load(std::memory_order_relaxed) == kAtHome;
    return piece + (at_home ? node_threads_[self.node] : cpus_.size());
}

// The caller's part of a run. Returns whether another program had its core meanwhile.
bool Pool::drive() {
    Thread& self = *threads_[0];
    bool lost = false;
    for (size_t piece; self.begin_piece(), take(self, piece);) {
        work_on(piece, self);
        lost |= self.lost_core();
    }
    return lost;
}

// The caller lost its core. Once that is no accident, and some other core of its node is far less crowded, two threads take each other's CPU. (When a CPU is
// no longer ours, both stay where they are.)
void Pool::change_places() {
    Thread& self = *threads_[0];
    self.crowd();
    const int64_t now = self.seen;
    const auto rank = [&](const auto& thread) { return std::pair(thread->node != self.node, thread->level(now)); };
    Thread& worker = **std::min_element(threads_.begin() + 1, threads_.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
    if (worker.node != self.node || self.level(now) < 2 * std::max(worker.level(now), kFirstCrowdNs)) return;
    std::swap(cpus_[0], cpus_[worker.index]);
    self.crowd_ns.store(worker.crowd_ns.exchange(self.crowd_ns, std::memory_order_relaxed), std::memory_order_relaxed);
    self.crowded_until.store(worker.crowded_until.exchange(self.crowded_until, std::memory_order_relaxed), std::memory_order_relaxed);
    try_pin(worker.handle, cpus_[worker.index]);
    try_pin(pthread_self(), cpus_[0]);
}

void* Pool::thread_main(void* worker) {
    Thread& self = *static_cast<Thread*>(worker);
    while (self.pool.wait_for_work(self)) self.pool.help(self);
    return nullptr;
}

// A worker's part of a run.
void Pool::help(Thread& self) {
    for (size_t piece; self.begin_piece(), take(self, piece);) {
        work_on(piece, self);
        if (self.lost_core()) self.crowd();
        if (!self.holds_piece()) self.nap_when_due();
    }
}

// Returns whether there is work; if not, the pool ends.
bool Pool::wait_for_work(Thread& self) {
    for (;; park()) {
        const int64_t begin = self.seen = now_ns();
        for (;;) {
            const uint32_t left = left_.load(std::memory_order_relaxed);  // take is the one that acquires
            if (has_work(left, self)) return left != kStop;
            if (self.seen - begin >= spin_ns_) break;
            idle(self, begin);
        }
    }
}

// One turn of waiting that began at `begin`.
void Pool::idle(Thread& self, int64_t begin) {
    if (self.crowded()) {
        self.nap_when_due();
    } else if (self.seen - begin > kPauseNs) {
        return self.yield();
    }
    _mm_pause();
    self.look_at_clock();
}

void Pool::park() {
    parked_.fetch_add(1);
    if (left_.load() == 0) futex(left_, FUTEX_WAIT, 0);
    parked_.fetch_sub(1);
}

}  // namespace moespan
