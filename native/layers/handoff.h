// A step that the GPU and the pool take in turns. The GPU runs one captured graph; where it needs experts it raises a flag in pinned memory, the pool runs
// the operation of that number and raises the answer, on which the graph waits.
//
//   GPU    ... attention, router ── asked[i] = 1 ── shared experts ── wait for answered[i] ── add ...
//   pool   ............................ operation i of the program ── answered[i] = 1 .............
//
// A GPU that waits for ever hangs the whole process, so each flag is answered whatever happens: an operation that throws, or takes longer than the
// timeout, or a GPU that does not ask in time, answers all that are left as failed. The graph then runs to its end over numbers that nobody reads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "layers/program.h"

namespace moespan {

constexpr size_t kFlagStride = 64 / sizeof(uint32_t);  // each flag has a cache line of its own

class Handoff {
  public:
    enum Answer : uint32_t { kNone = 0, kDone = 1, kFailed = 2 };

    // When the GPU asked for an operation and when the pool had answered, in nanoseconds since the step's reset.
    struct Turn {
        int64_t asked, answered;
    };

    // `count` flags each way, a cache line apart, in memory that the GPU can reach and that outlives this. Throws std::system_error without a thread.
    Handoff(uint32_t* asked, uint32_t* answered, size_t count, int64_t timeout_ns);
    ~Handoff();
    Handoff(const Handoff&) = delete;
    Handoff& operator=(const Handoff&) = delete;

    size_t count() const { return turns_.size(); }
    const std::vector<Turn>& turns() const { return turns_; }

    // Takes all flags down; before the graph is launched.
    void reset();

    // Runs operation i when asked[i] is raised, for each i in order; `program` has `count` of them. Throws what an operation throws, or
    // std::runtime_error after a timeout; then all flags are answered.
    void serve(Pool& pool, const Program& program, const Place& place);

    // Answers all flags that are not answered yet as failed.
    void fail();

  private:
    bool await(size_t i) const;
    void watch();
    std::atomic<uint32_t>& asked(size_t i) const { return *reinterpret_cast<std::atomic<uint32_t>*>(asked_ + i * kFlagStride); }
    std::atomic<uint32_t>& answered(size_t i) const { return *reinterpret_cast<std::atomic<uint32_t>*>(answered_ + i * kFlagStride); }

    uint32_t *const asked_, *const answered_;
    const int64_t timeout_ns_;
    std::vector<Turn> turns_;
    int64_t reset_at_ = 0;

    std::atomic<int64_t> begun_at_{0};  // of the operation that runs; 0: none does
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    bool closing_ = false;
    std::thread watchdog_;
};

}  // namespace moespan
