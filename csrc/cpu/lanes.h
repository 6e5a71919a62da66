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

// What folds two rows into one, so that three of them, the last as often as it takes, leave lane i the sum of row i:
// numbers, pairs of numbers and quarters of 16 bytes that stand beside each other are added.
#if defined(__AVX512F__)
inline Float fold_numbers(Float a, Float b) {
    return (Float)_mm512_unpacklo_ps((__m512)a, (__m512)b) + (Float)_mm512_unpackhi_ps((__m512)a, (__m512)b);
}
inline Float fold_pairs(Float a, Float b) {
    return (Float)_mm512_unpacklo_pd((__m512d)a, (__m512d)b) + (Float)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
}
inline Float fold_quarters(Float a, Float b) {
    return (Float)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) +
           (Float)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
}
#elif defined(__AVX2__)
inline Float fold_numbers(Float a, Float b) {
    return (Float)_mm256_unpacklo_ps((__m256)a, (__m256)b) + (Float)_mm256_unpackhi_ps((__m256)a, (__m256)b);
}
inline Float fold_pairs(Float a, Float b) {
    return (Float)_mm256_unpacklo_pd((__m256d)a, (__m256d)b) + (Float)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
}
inline Float fold_quarters(Float a, Float b) {
    return (Float)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20) +
           (Float)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
}
#endif

// Lane i: the sum of rows[i].
inline Float sums(const Float (&rows)[LANES]) {
#if defined(__AVX2__)
    Float left[LANES / 2];
    for (int i = 0; i < LANES / 2; ++i) left[i] = fold_numbers(rows[2 * i], rows[2 * i + 1]);
    for (int i = 0; i < LANES / 4; ++i) left[i] = fold_pairs(left[2 * i], left[2 * i + 1]);
    for (int count = LANES / 8; count; count /= 2)
        for (int i = 0; i < count; ++i) left[i] = fold_quarters(left[2 * i], left[2 * i + 1]);
    return left[0];
#else
    Float all;
    for (int i = 0; i < LANES; ++i) all[i] = sum(rows[i]);
    return all;
#endif
}

}  // namespace
}  // namespace llmquant
