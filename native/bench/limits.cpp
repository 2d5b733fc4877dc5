#include "bench/limits.h"

#include <algorithm>
#include <chrono>

namespace moespan {
namespace {

constexpr double kLongEnough = 0.03;     // seconds: far longer than a fork and a join
constexpr size_t kPiecesPerThread = 16;  // of the same work: a thread that wakes late leaves some of its own to the others
constexpr int kTries = 5;                // the best of them: what disturbs can only slow down

template <class Work>
double seconds_of(const Work& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

double read_sweep(Pool& pool, const float* data, size_t bytes) {
    const auto read_all = pool.kernels().read_all;
    const auto read_chunk = [&](size_t i, uint8_t*) { read_all(data + i * (kSweepChunk / sizeof(float)), kSweepChunk / sizeof(float)); };
    return seconds_of([&] { pool.each(bytes / kSweepChunk, read_chunk); });
}

double peak_rate(Pool& pool, const PeakLoop& loop) {
    const auto rate = [&](size_t rounds, double& seconds) {
        const auto pieces = static_cast<size_t>(pool.threads()) * kPiecesPerThread;
        seconds = seconds_of([&] { pool.each(pieces, [&](size_t, uint8_t*) { loop.run(rounds, 1.0f); }); });
        return loop.operations * static_cast<double>(rounds) * static_cast<double>(pieces) / seconds;
    };
    size_t rounds = 1000;
    double seconds = 0, best = 0;
    for (rate(rounds, seconds); seconds < kLongEnough; rate(rounds, seconds)) rounds *= 2;
    for (int i = 0; i < kTries; ++i) best = std::max(best, rate(rounds, seconds));
    return best;
}

}  // namespace moespan
