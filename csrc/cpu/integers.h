// Activations to integers, a block at a time. See linear.h.
#pragma once

#include "numbers.h"

namespace llmquant {
namespace {

Float nearest_integer(Float x) { return (x + 12582912.0f) - 12582912.0f; }  // below 2^22, halves to even

// Activations of one block, filled up to its width; those from column i of a plane on go to place(plane, i). NaN and
// Inf make the scale NaN, and all that is computed with it.
template <int PLANES, typename Place>
void block_to_integers(const float* x, int64_t width, Place place, float* scale, int32_t* total) {
    constexpr float LIMIT = PLANES == 1 ? 127.0f : 127.0f * 128.0f + 63.0f;
    Float most_of = {}, probe = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Float value = load<Float>(x + i);
        const Float size = (Float)((Int)value & 0x7fffffff);
        most_of = size > most_of ? size : most_of;
        probe += value - value;
    }
    const float most = largest(most_of), broken = sum(probe);
    const bool usable = broken == 0.0f && most > 1e-30f;
    const float inverse = usable ? LIMIT / most : 0.0f;
    Int integers = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Float scaled = usable ? load<Float>(x + i) * inverse : Float{};
        const Int integer = __builtin_convertvector(nearest_integer(scaled), Int);
        integers += integer;
        if (PLANES == 1) {
            narrow(place(0, i), integer);
        } else {
            const Int high = (integer + 64) >> 7;
            narrow(place(0, i), high);
            narrow(place(1, i), integer - (high << 7));
        }
    }
    *scale = (usable ? most / LIMIT : 0.0f) + broken;
    *total = sum(integers);
}

}  // namespace
}  // namespace llmquant
