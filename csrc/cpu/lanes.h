// What changes the width of lanes or combines all of them: the portable forms are slow, lane by lane, in GCC 12.
#pragma once

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmquant {
namespace {

#if defined(__AVX512F__)

inline Int widen(const uint8_t* from) { return (Int)_mm512_cvtepu8_epi32(load<__m128i>(from)); }
inline Int widen(const uint16_t* from) { return (Int)_mm512_cvtepu16_epi32(load<__m256i>(from)); }
inline void narrow(int8_t* to, Int value) { store(to, _mm512_cvtepi32_epi8((__m512i)value)); }
inline void narrow(uint16_t* to, Int value) { store(to, _mm512_cvtepi32_epi16((__m512i)value)); }
inline float largest(Float value) { return _mm512_reduce_max_ps((__m512)value); }
inline float sum(Float value) { return _mm512_reduce_add_ps((__m512)value); }
inline int32_t sum(Int value) { return _mm512_reduce_add_epi32((__m512i)value); }

#else

#if defined(__AVX2__)
inline Int widen(const uint8_t* from) { return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
inline Int widen(const uint16_t* from) { return (Int)_mm256_cvtepu16_epi32(load<__m128i>(from)); }
#else
template <typename Number>
inline Int widen(const Number* from) {
    Int value;
    for (int i = 0; i < LANES; ++i) value[i] = from[i];
    return value;
}
#endif

template <typename Number>
inline void narrow(Number* to, Int value) {
    for (int i = 0; i < LANES; ++i) to[i] = static_cast<Number>(value[i]);
}

inline float largest(Float value) {
    float most = value[0];
    for (int i = 1; i < LANES; ++i) most = value[i] > most ? value[i] : most;
    return most;
}

template <typename Vector>
inline auto sum(Vector value) {
    auto total = value[0];
    for (int i = 1; i < LANES; ++i) total += value[i];
    return total;
}

#endif

}  // namespace
}  // namespace llmquant
