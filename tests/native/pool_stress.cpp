// What test_pool_native.py builds and runs.
//
//   pool_stress CPU[,CPU..] RUNS    many short runs, for ThreadSanitizer. The data is not atomic on purpose, for it is the pool that orders the pieces of a
//                                   run after the caller's writes, and the next run after those pieces.
//   pool_stress CPU[,CPU..] RUNS nodes
//                                   the same, every second run with pieces that belong to nodes: the threads of the CPUs are on two, by turns
//   pool_stress CPU,CPU next        how often a thread works next on what it was told that it would, of all times that its next piece was taken ahead
//   pool_stress CPU,CPU wake        microseconds from a run's begin until its caller knows that the worker is at it, each thread with one piece: the median
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "pool/pool.h"

namespace {

constexpr size_t kMostPieces = 40;
constexpr int kSpinUs = 100;  // short, so that workers park between some runs and spin between others

// One run of `count` pieces over `values`, each of which must stand at `before` and leaves at before + 1. What it captures is on this frame: a thread
// that still came with an old piece would race with the next run's frame.
bool run(moespan::Pool& pool, std::vector<long>& values, std::vector<size_t>& order, size_t count, long before) {
    std::vector<size_t> wrong(count, 0);
    pool.each(count, [&](size_t i, uint8_t* scratch) {
        scratch[0] = static_cast<uint8_t>(i);  // the thread's own
        if (values[i] != before) ++wrong[i];
        for (volatile int spin = 0; spin < static_cast<int>(i) * 20;) spin = spin + 1;
        values[i] = before + 1;
        order[i] = scratch[0];
    });
    for (size_t i = 0; i < count; ++i) {
        if (wrong[i] != 0 || values[i] != before + 1 || order[i] != i) return false;
        values[i] = 0;
    }
    return true;
}

// One run whose pieces belong to nodes, `count` to one and half as many to the other: none is done elsewhere, twice or not at all.
bool run_at_home(moespan::Pool& pool, std::vector<long>& values, size_t count, long before) {
    const size_t counts[2] = {count, count / 2};
    std::vector<size_t> nodes(counts[0] + counts[1], 2);
    pool.each_at_home(counts, [&](size_t i, const moespan::Seat& seat) {
        const size_t at = seat.node * counts[0] + i;
        seat.scratch[0] = static_cast<uint8_t>(i);
        for (volatile int spin = 0; spin < static_cast<int>(i) * 20;) spin = spin + 1;
        nodes[at] = values[at] == before ? seat.node : 2;
        values[at] = before + 1;
    });
    for (size_t at = 0; at < nodes.size(); ++at) {
        if (nodes[at] != at / std::max<size_t>(counts[0], 1) || values[at] != before + 1) return false;
        values[at] = 0;
    }
    return true;
}

double median_wake_us(moespan::Pool& pool) {
    std::vector<double> times;
    for (int i = 0; i < 200; ++i) {
        std::atomic<int> begun{0};
        const auto begin = std::chrono::steady_clock::now();
        pool.each(2, [&](size_t, uint8_t*) {
            for (++begun; begun < 2;) {}
        });
        times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
        while (std::chrono::steady_clock::now() - begin < std::chrono::microseconds(30)) {}  // as between the runs of a step
    }
    std::nth_element(times.begin(), times.begin() + 100, times.end());
    return times[100];
}

// Pieces of very different lengths, so that threads do not keep step. What a thread was told lies in its scratch.
double share_foretold(moespan::Pool& pool) {
    constexpr size_t kPieces = 200, kLast = 40;  // of the last, next is a guess
    struct Told {
        size_t run, next;
    };
    pool.reserve_scratch(sizeof(Told));
    std::atomic<size_t> foretold{0}, asked{0};
    for (size_t run = 1; run <= 50; ++run) {
        pool.each_seated(kPieces, [&](size_t i, const moespan::Seat& seat) {
            Told* told = reinterpret_cast<Told*>(seat.scratch);
            if (told->run == run && i < kPieces - kLast) {
                ++asked;
                if (told->next == i) ++foretold;
            }
            *told = {run, seat.next};
            for (volatile size_t spin = 0; spin < i * 7919 % 1000 * 10;) spin = spin + 1;
        });
    }
    return static_cast<double>(foretold) / static_cast<double>(asked);
}

std::vector<int> parse(const char* list) {
    std::vector<int> cpus;
    for (char* end; *list != '\0'; list = *end == ',' ? end + 1 : end) cpus.push_back(static_cast<int>(std::strtol(list, &end, 10)));
    return cpus;
}

}  // namespace

int main(int count, char** arguments) {
    const moespan::KernelTable kernels{};
    const std::vector<int> cpus = parse(arguments[1]);
    std::vector<size_t> nodes(cpus.size(), 0);
    const bool at_home = count > 3;
    for (size_t i = 0; at_home && i < nodes.size(); ++i) nodes[i] = i % 2;
    moespan::Pool pool(cpus, kernels, kSpinUs, nodes);
    pool.pin_caller();
    pool.reserve_scratch(64);
    if (std::strcmp(arguments[2], "next") == 0) return std::printf("%.3f\n", share_foretold(pool)), 0;
    if (std::strcmp(arguments[2], "wake") == 0) return std::printf("%.2f\n", median_wake_us(pool)), 0;
    std::vector<long> values(kMostPieces + kMostPieces / 2, 0);
    std::vector<size_t> order(kMostPieces, 0);
    const int runs = std::atoi(arguments[2]);
    for (int i = 0; i < runs; ++i) {
        for (long& value : values) value = i;
        const size_t pieces = static_cast<size_t>(i * 7) % (kMostPieces + 1);
        if (!(at_home && i % 2 == 0 ? run_at_home(pool, values, pieces, i) : run(pool, values, order, pieces, i))) return std::puts("a piece was left out, or done twice, or too early"), 1;
        if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
    std::puts("ok");
    return 0;
}
