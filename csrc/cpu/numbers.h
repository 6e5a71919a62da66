// bf16, fp16 and fp32 in memory, fp32 in registers.
#pragma once

#include "lanes.h"
#include "linear.h"

namespace llmquant {
namespace {

// bf16 is the upper half of a float. fp16 with its bits put in place lacks 112 in the exponent.
inline Float from_half(const uint16_t* from, int64_t kind) {
    const Int word = widen(from);
    if (kind == LLMQUANT_BF16) return (Float)(word << 16);
    const Int magnitude = word & 0x7fff;
    const Float finite = (Float)(magnitude << 13) * 0x1p112f;
    const Int bits = magnitude < 0x7c00 ? (Int)finite : magnitude << 13 | 0x7f800000;
    return (Float)(bits | (word & 0x8000) << 16);
}

// To the nearest, halves to even. NaN stays NaN.
inline Int to_half(Float value, int64_t kind) {
    const Int bits = (Int)value, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (kind == LLMQUANT_BF16) {
        const Int rounded = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
        return sign | (magnitude > 0x7f800000 ? Int{} + 0x7fc0 : rounded);
    }
    // Below 2^-14 the distance of two numbers is fixed: adding 1/2 moves them to where a float's is the same.
    const Int small = (Int)((Float)magnitude + 0.5f) - 0x3f000000;
    const Int normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Int finite = magnitude < 0x38800000 ? small : magnitude < 0x47800000 ? normal : Int{} + 0x7c00;
    return sign | (magnitude > 0x7f800000 ? Int{} + 0x7e00 : finite);
}

// Numbers [at, at + count) as floats. `to` has room for whole vectors; what is past `count` becomes zero.
template <int MOST>
inline void read(const void* from, int64_t kind, int64_t at, int64_t count, float (&to)[MOST]) {
    const int64_t whole = count / LANES * LANES;
    if (kind == LLMQUANT_FP32) {
        const float* numbers = static_cast<const float*>(from) + at;
        for (int64_t i = 0; i < whole; i += LANES) store(to + i, load<Float>(numbers + i));
        for (int64_t i = whole; i < MOST; i += LANES) store(to + i, Float{});
        copy(to + whole, numbers + whole, count - whole);
        return;
    }
    const uint16_t* words = static_cast<const uint16_t*>(from) + at;
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, from_half(words + i, kind));
    for (int64_t i = whole; i < MOST; i += LANES) store(to + i, Float{});
    if (whole < count) {
        uint16_t rest[LANES] = {};
        copy(rest, words + whole, count - whole);
        store(to + whole, from_half(rest, kind));
    }
}

// Whole vectors go as such: a loop over a count that the compiler does not know is slow to begin.
template <int MOST>
inline void write(const float (&from)[MOST], void* to, int64_t kind, int64_t at, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    if (kind == LLMQUANT_FP32) {
        float* numbers = static_cast<float*>(to) + at;
        for (int64_t i = 0; i < whole; i += LANES) store(numbers + i, load<Float>(from + i));
        copy(numbers + whole, from + whole, count - whole);
        return;
    }
    uint16_t* words = static_cast<uint16_t*>(to) + at;
    for (int64_t i = 0; i < whole; i += LANES) narrow(words + i, to_half(load<Float>(from + i), kind));
    if (whole < count) {
        uint16_t rest[LANES];
        narrow(rest, to_half(load<Float>(from + whole), kind));
        copy(words + whole, rest, count - whole);
    }
}

}  // namespace
}  // namespace llmquant
