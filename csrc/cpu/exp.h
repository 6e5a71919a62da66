// Powers of two and what is made of them.
#pragma once

#include "vectors.h"

namespace llmquant {
namespace {

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, and 0 below -127: the series of 2^f, |f| <= 1/2, which errs by 2^-23, and an exponent.
inline Float exp2_of(Float x) {
    x = x < -127.0f ? Float{} - 127.0f : x;
    const Float whole_part = (x + 12582912.0f) - 12582912.0f, f = x - whole_part;
    Float series = Float{} + 1.54035304e-4f;
    series = series * f + 1.33335581e-3f;
    series = series * f + 9.61812911e-3f;
    series = series * f + 5.55041087e-2f;
    series = series * f + 2.40226507e-1f;
    series = series * f + 6.93147181e-1f;
    series = series * f + 1.0f;
    return series * (Float)((__builtin_convertvector(whole_part, Int) + 127) << 23);
}

// x / (1 + exp(-x)).
inline Float silu(Float x) {
    const Float size = (Float)((Int)x & 0x7fffffff), small = exp2_of(size * -LOG2_E), near = 1.0f / (1.0f + small);
    return x * (x < 0.0f ? small * near : near);
}

}  // namespace
}  // namespace llmquant
