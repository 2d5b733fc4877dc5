// exp for any Vec: e^x = 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2.
//
// The polynomial for e^r is the one of Cephes' expf (degree 5 for (e^r - 1 - r) / r^2); ln 2 is split in two so that r keeps its low bits
// (Cody and Waite). Relative error: about 1e-7 where the result is normal. Outside [-104, 89] the result is 0 or inf; NaN stays NaN.
#pragma once

namespace moespan {
namespace {

template <class V>
inline typename V::Reg vec_exp(typename V::Reg x) {
    // min and max keep NaN when it is their second operand.
    x = V::min(V::broadcast(89.0f), V::max(V::broadcast(-104.0f), x));
    const auto n = V::round(V::mul(x, V::broadcast(1.44269504088896341f)));
    auto r = V::fma(n, V::broadcast(-0.693359375f), x);
    r = V::fma(n, V::broadcast(2.12194440e-4f), r);
    auto p = V::broadcast(1.9875691500e-4f);
    p = V::fma(p, r, V::broadcast(1.3981999507e-3f));
    p = V::fma(p, r, V::broadcast(8.3334519073e-3f));
    p = V::fma(p, r, V::broadcast(4.1665795894e-2f));
    p = V::fma(p, r, V::broadcast(1.6666665459e-1f));
    p = V::fma(p, r, V::broadcast(5.0000001201e-1f));
    p = V::fma(V::mul(p, r), r, V::add(r, V::broadcast(1.0f)));
    return V::scale_by_power(p, n);
}

}  // namespace
}  // namespace moespan
