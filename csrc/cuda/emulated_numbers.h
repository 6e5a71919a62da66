// fp16 and bf16 on the CPU, bit by bit, for emulated.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace llmquant::cuda::emulated {

inline double decoded(uint32_t bits, Fp16) {
    const int exponent = bits >> 10 & 31;
    const double mantissa = bits & 1023;
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

inline double decoded(uint32_t bits, Bf16) {
    const uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// To the nearest number of `digits` binary digits whose last is worth 2^least or more; halves to even.
inline double rounded(double value, int digits, int least) {
    if (value == 0 || !std::isfinite(value)) return value;
    const int last = std::max(std::ilogb(value) + 1 - digits, least);
    return std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
}

inline uint32_t encoded(double value, Fp16) {
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    const double size = std::fabs(rounded(value, 11, -24));
    if (size > 65504) return sign | 0x7c00;
    if (size < std::ldexp(1.0, -14)) return sign | static_cast<uint32_t>(std::ldexp(size, 24));
    const int exponent = std::ilogb(size);
    return sign | static_cast<uint32_t>(exponent + 15) << 10 |
           (static_cast<uint32_t>(std::ldexp(size, 10 - exponent)) & 1023);
}

inline uint32_t encoded(double value, Bf16) {
    const float near = static_cast<float>(rounded(value, 8, -133));
    uint32_t bits;
    std::memcpy(&bits, &near, 4);
    return std::isnan(value) ? 0x7fff : bits >> 16;
}

}  // namespace llmquant::cuda::emulated
