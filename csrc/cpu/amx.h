// Tiles of Intel's AMX: 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace llmquant {
namespace {

constexpr int64_t ROW = 64;  // bytes of a row of a tile

struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// What tiles will read is in memory: the instructions do not tell the compiler that they read it.
inline void stored() { __asm__ volatile("" ::: "memory"); }

}  // namespace
}  // namespace llmquant
