// Vectors as wide as the instruction set that the including file is compiled for.
//
// They are those of GCC and Clang, which map them to whatever the machine has. Here and in every file that is compiled
// once per instruction set: no header of the standard library but <cstdint>, because one of its inline functions,
// compiled for AVX-512, could be the copy that the linker keeps. All of it has internal linkage for the same reason.
#pragma once

#include <cstdint>

#if !defined(__GNUC__)
#error "needs the vector extensions of GCC or Clang"
#endif

namespace llmquant {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using Float = float __attribute__((vector_size(4 * LANES)));
using Int = int32_t __attribute__((vector_size(4 * LANES)));

template <typename Vector>
inline Vector load(const void* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <typename Vector>
inline void store(void* to, const Vector& value) {
    __builtin_memcpy(to, &value, sizeof value);
}

// A count that the compiler does not know: it would make `rep movs` of memcpy, which takes longer to begin than a block
// takes to be copied, the more so beside other threads.
template <typename Number>
inline void copy(Number* to, const Number* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace llmquant
