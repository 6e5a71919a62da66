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

// Lane i: the sum of rows[i]. Two rows at a time are halved and put beside each other, until one is left.
#if defined(__AVX512F__)
inline Float sums(const Float (&rows)[LANES]) {
    __m512 twos[8], fours[4], eights[2];
    for (int i = 0; i < 8; ++i) {
        const auto a = (__m512)rows[2 * i], b = (__m512)rows[2 * i + 1];
        twos[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; ++i) {
        const auto a = (__m512d)twos[2 * i], b = (__m512d)twos[2 * i + 1];
        fours[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return (Float)_mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                                _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}
#elif defined(__AVX2__)
inline Float sums(const Float (&rows)[LANES]) {
    __m256 twos[4], fours[2];
    for (int i = 0; i < 4; ++i) {
        const auto a = (__m256)rows[2 * i], b = (__m256)rows[2 * i + 1];
        twos[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 2; ++i) {
        const auto a = (__m256d)twos[2 * i], b = (__m256d)twos[2 * i + 1];
        fours[i] = _mm256_add_ps((__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b));
    }
    return (Float)_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                                _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
#else
inline Float sums(const Float (&rows)[LANES]) {
    Float all;
    for (int i = 0; i < LANES; ++i) all[i] = sum(rows[i]);
    return all;
}
#endif

}  // namespace
}  // namespace llmquant
