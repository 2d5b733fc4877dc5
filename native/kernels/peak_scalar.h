// The limits of baseline x86-64, which has SSE2: four floats at a time, and no fused multiply-add.
#pragma once

#include <emmintrin.h>

#include "peak-inl.h"

namespace moespan {
namespace {

struct PeakScalar {
    struct Vec {
        static constexpr int kLanes = 4;
        using Reg = __m128;

        static Reg zero() { return _mm_setzero_ps(); }
        static Reg broadcast(float value) { return _mm_set1_ps(value); }
        static Reg load(const float* p) { return _mm_loadu_ps(p); }
        static Reg add(Reg a, Reg b) { return _mm_add_ps(a, b); }
        static Reg fma(Reg a, Reg b, Reg c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
        static float reduce_sum(Reg x) {
            const Reg two = _mm_add_ps(x, _mm_movehl_ps(x, x));
            return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
        }
    };
    static constexpr PeakLoop kLoops[] = {f32_loop<Vec, 12>()};
};

}  // namespace
}  // namespace moespan
