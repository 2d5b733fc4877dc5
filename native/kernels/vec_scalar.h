// VecScalar: eight floats in an array, plain C++: the reference that the other Vec types are held to, and what runs on a CPU without AVX2.
//
// Every Vec type has these static functions (fma(a, b, c) is a * b + c). `n` of the partial forms is 0 <= n <= kLanes; the lanes that a
// partial load does not read are 0. A half is an IEEE binary16 in a uint16_t, rounded to nearest even when stored.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "vec_exp-inl.h"

namespace moespan {
namespace {

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t exponent_mantissa = (uint32_t)(half & 0x7fffu) << 13;
    if ((half & 0x7c00u) == 0x7c00u) return bits_to_float(sign | exponent_mantissa | 0x7f800000u);  // inf, NaN
    // Read as a float the number is 2^112 too small (bias 127 instead of 15); the product is exact, subnormals included.
    return bits_to_float(sign | float_to_bits(bits_to_float(exponent_mantissa) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above round to inf
    if (magnitude < 0x38800000u) {                                   // below 2^-14: a subnormal half
        // Adding 0.5 puts the last bit of the sum at 2^-24, the step of subnormal halves: the FPU rounds for us.
        return (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t round = 0xfffu + (magnitude >> 13 & 1u);  // to nearest, ties to even
    return (uint16_t)(sign | ((magnitude - 0x38000000u + round) >> 13));
}

struct VecScalar {
    static constexpr int kLanes = 8;
    struct Reg {
        float lane[kLanes];
    };

    template <class F>
    static Reg each(F f) {
        Reg r;
        for (int i = 0; i < kLanes; ++i) r.lane[i] = f(i);
        return r;
    }

    static Reg zero() { return broadcast(0.0f); }
    static Reg broadcast(float value) { return each([=](int) { return value; }); }
    static Reg load(const float* p) { return each([=](int i) { return p[i]; }); }
    static Reg load_half(const uint16_t* p) { return each([=](int i) { return half_to_float(p[i]); }); }
    static Reg load_partial(const float* p, int n) { return each([=](int i) { return i < n ? p[i] : 0.0f; }); }
    static Reg load_half_partial(const uint16_t* p, int n) { return each([=](int i) { return i < n ? half_to_float(p[i]) : 0.0f; }); }
    static void store(float* p, Reg x) { store_partial(p, x, kLanes); }
    static void store_half(uint16_t* p, Reg x) { store_half_partial(p, x, kLanes); }
    static void store_partial(float* p, Reg x, int n) {
        for (int i = 0; i < n; ++i) p[i] = x.lane[i];
    }
    static void store_half_partial(uint16_t* p, Reg x, int n) {
        for (int i = 0; i < n; ++i) p[i] = float_to_half(x.lane[i]);
    }

    static Reg add(Reg a, Reg b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
    static Reg sub(Reg a, Reg b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
    static Reg mul(Reg a, Reg b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
    static Reg div(Reg a, Reg b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
    static Reg sqrt(Reg x) { return each([&](int i) { return __builtin_sqrtf(x.lane[i]); }); }
    static Reg fma(Reg a, Reg b, Reg c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
    // As the SSE instructions do: the second operand when either is NaN.
    static Reg max(Reg a, Reg b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    static Reg min(Reg a, Reg b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }

    // To the nearest integer, ties to even, for |x| < 2^22: the sum's last bit is 1.
    static Reg round(Reg x) {
        return each([&](int i) {
            const float sum = x.lane[i] + 0x1.8p23f;
            return sum - 0x1.8p23f;
        });
    }
    // x * 2^n for an integer-valued n in [-252, 254], in two steps so that neither factor leaves the normal range.
    static Reg scale_by_power(Reg x, Reg n) {
        return each([&](int i) {
            if (n.lane[i] != n.lane[i]) return n.lane[i];
            const int exponent = (int)n.lane[i], half = exponent >> 1;
            return x.lane[i] * bits_to_float((uint32_t)(half + 127) << 23) * bits_to_float((uint32_t)(exponent - half + 127) << 23);
        });
    }
    static Reg exp(Reg x) { return vec_exp<VecScalar>(x); }

    // even = a0 a2 .. b0 b2 .., odd = a1 a3 .. b1 b3 ..; zip is its inverse.
    static void unzip(Reg a, Reg b, Reg& even, Reg& odd) {
        even = each([&](int i) { return i < kLanes / 2 ? a.lane[2 * i] : b.lane[2 * i - kLanes]; });
        odd = each([&](int i) { return i < kLanes / 2 ? a.lane[2 * i + 1] : b.lane[2 * i + 1 - kLanes]; });
    }
    static void zip(Reg even, Reg odd, Reg& a, Reg& b) {
        a = each([&](int i) { return i % 2 == 0 ? even.lane[i / 2] : odd.lane[i / 2]; });
        b = each([&](int i) { return i % 2 == 0 ? even.lane[(i + kLanes) / 2] : odd.lane[(i + kLanes) / 2]; });
    }

    static float reduce_sum(Reg x) {
        return ((x.lane[0] + x.lane[4]) + (x.lane[2] + x.lane[6])) + ((x.lane[1] + x.lane[5]) + (x.lane[3] + x.lane[7]));
    }
    static float reduce_max(Reg x) {
        float best = x.lane[0];
        for (int i = 1; i < kLanes; ++i) best = x.lane[i] > best ? x.lane[i] : best;
        return best;
    }
};

}  // namespace
}  // namespace moespan
