#include "layers/handoff.h"

#include <immintrin.h>

#include <chrono>
#include <stdexcept>
#include <string>

namespace moespan {
namespace {

constexpr int kPausesPerLook = 64;  // at a flag, between looks at the clock

int64_t now_ns() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// What is thrown once the watchdog, or the wait for the GPU, has given up.
[[noreturn]] void time_out(const char* who, size_t i, int64_t timeout_ns) {
    throw std::runtime_error(std::string(who) + " took more than " + std::to_string(timeout_ns / 1000000) + " ms over hand-over " + std::to_string(i));
}

}  // namespace

Handoff::Handoff(uint32_t* asked, uint32_t* answered, size_t count, int64_t timeout_ns)
    : asked_(asked), answered_(answered), timeout_ns_(timeout_ns), turns_(count), watchdog_([this] { watch(); }) {}

Handoff::~Handoff() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
    }
    wake_.notify_one();
    watchdog_.join();
}

void Handoff::reset() {
    for (size_t i = 0; i < count(); ++i) {
        asked(i).store(kNone, std::memory_order_relaxed);
        answered(i).store(kNone, std::memory_order_relaxed);
    }
    failed_.store(false, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    reset_at_ = now_ns();
}

void Handoff::serve(Pool& pool, const Program& program, const Place& place) {
    for (size_t i = 0; i < count(); ++i) {
        if (!await(i)) {
            fail();
            time_out("The GPU", i, timeout_ns_);
        }
        const int64_t begin = now_ns();
        begun_at_.store(begin);
        try {
            program.run(i, pool, place);
        } catch (...) {
            begun_at_.store(0);
            fail();
            throw;
        }
        begun_at_.store(0);
        if (failed_.load()) time_out("The pool of CPU threads", i, timeout_ns_);
        answered(i).store(kDone, std::memory_order_release);
        turns_[i] = {begin - reset_at_, now_ns() - reset_at_};
    }
}

// Spins, as a pool that answers within microseconds must; false after the timeout.
bool Handoff::await(size_t i) const {
    const int64_t begin = now_ns();
    while (asked(i).load(std::memory_order_acquire) == kNone) {
        for (int pause = 0; pause < kPausesPerLook && asked(i).load(std::memory_order_acquire) == kNone; ++pause) _mm_pause();
        if (now_ns() - begin > timeout_ns_) return false;
    }
    return true;
}

void Handoff::fail() {
    failed_.store(true);
    for (size_t i = 0; i < count(); ++i) {
        uint32_t none = kNone;
        answered(i).compare_exchange_strong(none, kFailed);
    }
}

// Looks a few times a timeout at how long the operation has run. It sleeps otherwise, so that it costs nothing.
void Handoff::watch() {
    std::unique_lock lock(mutex_);
    while (!closing_) {
        wake_.wait_for(lock, std::chrono::nanoseconds(timeout_ns_ / 4));
        const int64_t begun = begun_at_.load();
        if (begun != 0 && now_ns() - begun > timeout_ns_) fail();
    }
}

}  // namespace moespan
