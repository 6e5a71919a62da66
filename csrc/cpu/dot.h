// Products of unsigned weights and signed activations, four bytes to a lane, summed in integers.
//
// A `Partial` begins with a sum and ends in it. Where its lanes have 16 bits it takes the products of 8 calls with
// weights of at most 15, 8 * 2 * 15 * 127 = 30480, and the sum is added at the end.
#pragma once

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmquant {
namespace {

using Halves = int16_t __attribute__((vector_size(4 * LANES)));

inline Int broadcast_word(const int8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return Int{} + word;
}

#if defined(__AVX512VNNI__)

constexpr bool WIDE = true;  // a Partial takes any number of products
using Partial = Int;
using Operand = Int;

inline Operand operand(const int8_t* x) { return broadcast_word(x); }

inline Partial add_products(Partial sum, Int weights, const Operand& x) {
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
}

inline Partial begin(Int sum) { return sum; }

inline Int end(Int, Partial partial) { return partial; }

#elif defined(__AVX2__)

constexpr bool WIDE = false;
using Partial = Halves;
using Operand = Int;

inline Operand operand(const int8_t* x) { return broadcast_word(x); }

inline Partial begin(Int) { return Partial{}; }

#if defined(__AVX512BW__)
inline Partial add_products(Partial sum, Int weights, const Operand& x) {
    return sum + (Halves)_mm512_maddubs_epi16((__m512i)weights, (__m512i)x);
}

inline Int end(Int sum, Partial partial) {
    return sum + (Int)_mm512_madd_epi16((__m512i)partial, _mm512_set1_epi16(1));
}
#else
inline Partial add_products(Partial sum, Int weights, const Operand& x) {
    return sum + (Halves)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x);
}

inline Int end(Int sum, Partial partial) {
    return sum + (Int)_mm256_madd_epi16((__m256i)partial, _mm256_set1_epi16(1));
}
#endif

#else

constexpr bool WIDE = false;
using Partial = Halves;

struct Operand {
    Halves even, odd;  // bytes 0 and 2, bytes 1 and 3
};

inline Operand operand(const int8_t* x) {
    const Halves words = (Halves)broadcast_word(x);
    return {words << 8 >> 8, words >> 8};
}

inline Partial begin(Int) { return Partial{}; }

inline Partial add_products(Partial sum, Int weights, const Operand& x) {
    const Halves even = (Halves)(weights & 0x00ff00ff), odd = (Halves)(weights >> 8 & 0x00ff00ff);
    return sum + even * x.even + odd * x.odd;
}

inline Int end(Int sum, Partial partial) {
    const Int words = (Int)partial;
    return sum + (words << 16 >> 16) + (words >> 16);
}

#endif

}  // namespace
}  // namespace llmquant
