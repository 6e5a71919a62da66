// The kernels, for the instruction set that the build names in LLMQUANT_LEVEL and turns on by compiler flags.

#include "linear.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmquant {
namespace {

// ACCUMULATORS vectors are summed up at a time, so that they and the weights fit the registers.
#if defined(__AVX512F__)
constexpr int ACCUMULATORS = 16;
#else
constexpr int ACCUMULATORS = 8;
#endif

constexpr int64_t BLOCK = 4;  // rows whose codes stay in the first-level cache while all tokens pass

// Columns are taken a chunk at a time: two vectors of them. With 4 bits a chunk is LANES bytes, whose low nibbles are
// the even columns and whose high nibbles are the odd ones; x is arranged to match. 32 columns are whole chunks.
constexpr int64_t CHUNK = 2 * LANES;

using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(LANES)));

struct Pair {
    Float first, second;
};

// The intrinsics are there because GCC makes a dozen instructions of the conversion, in place of one.
Int widen(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Int)_mm512_cvtepu8_epi32(load<__m128i>(from));
#elif defined(__AVX2__)
    return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Shorts), Int);
#endif
}

float sum(Float value) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) value[i] += value[i + half];
    return value[0];
}

int64_t padded(int64_t columns) { return ceil_div(columns, CHUNK) * CHUNK; }

// One row of a weight, unpacked chunk by chunk.
template <int BITS>
class Row {
  public:
    void open(const LlmquantLinear& task, int64_t row) {
        const int64_t groups = ceil_div(task.columns, task.group);
        codes = task.codes + row * ceil_div(task.columns * BITS, 8);
        scales = task.scales + row * groups;
        zeros = task.zeros ? task.zeros + row * groups : nullptr;
        whole = task.columns / CHUNK;
        // The last, partial chunk is copied, because the bytes after it may not be ours.
        __builtin_memset(tail, 0, BYTES);
        __builtin_memcpy(tail, codes + whole * BYTES, ceil_div((task.columns - whole * CHUNK) * BITS, 8));
    }

    void enter(int64_t group) {
        scale = scales[group];
        shift = -scale * static_cast<float>(zeros ? zeros[group] : 1 << (BITS - 1));
    }

    // A chunk's weights in the order of `arrange`.
    Pair weights(int64_t chunk) const {
        const uint8_t* from = at(chunk);
        if constexpr (BITS == 8) return {weight(widen(from)), weight(widen(from + LANES))};
        const Int octets = widen(from);
        return {weight(octets & 15), weight(octets >> 4)};
    }

    // A chunk's weights from left to right.
    Pair in_order(int64_t chunk) const {
        if constexpr (BITS == 8) return weights(chunk);
        const Shorts octets = __builtin_convertvector(load<Bytes>(at(chunk)), Shorts);
        const Shorts nibbles = (octets & 0x0f) | (octets & 0xf0) << 4;  // one to a byte
        uint8_t bytes[sizeof nibbles];
        __builtin_memcpy(bytes, &nibbles, sizeof nibbles);
        return {weight(widen(bytes)), weight(widen(bytes + LANES))};
    }

  private:
    static constexpr int64_t BYTES = CHUNK * BITS / 8;

    const uint8_t* at(int64_t chunk) const { return chunk < whole ? codes + chunk * BYTES : tail; }

    Float weight(Int code) const { return __builtin_convertvector(code, Float) * scale + shift; }

    const uint8_t* codes;
    const float* scales;
    const uint8_t* zeros;
    int64_t whole;
    float scale, shift;
    uint8_t tail[BYTES];
};

template <int BITS>
void arrange(const LlmquantLinear& task, float* arranged) {
    const int64_t stride = padded(task.columns);
    for (int64_t t = 0; t < task.tokens; ++t) {
        const float* from = task.x + t * task.columns;
        float* to = arranged + t * stride;
        for (int64_t i = task.columns / CHUNK * CHUNK; i < stride; ++i) to[i] = 0.0f;
        for (int64_t i = 0; i < task.columns; ++i) {
            const int64_t place = i % CHUNK;
            to[BITS == 4 ? i - place + place / 2 + place % 2 * LANES : i] = from[i];
        }
    }
}

// ROWS x TOKENS products at once: each unpacked weight serves all tokens. Every product is summed in the same order
// whatever the tile, so a token's result does not depend on the company it comes in.
template <int BITS, int ROWS, int TOKENS>
void multiply_tile(const LlmquantLinear& task, const float* arranged, int64_t first, int64_t token) {
    const int64_t stride = padded(task.columns), chunks = stride / CHUNK;
    const float* x = arranged + token * stride;
    Row<BITS> rows[ROWS];
    Float total[ROWS][TOKENS] = {};
    for (int r = 0; r < ROWS; ++r) rows[r].open(task, first + r);
    for (int64_t group = 0, chunk = 0; chunk < chunks; ++group) {
        for (int r = 0; r < ROWS; ++r) rows[r].enter(group);
        for (const int64_t end = min(chunks, chunk + ceil_div(task.group, CHUNK)); chunk < end; ++chunk)
            for (int r = 0; r < ROWS; ++r) {
                const Pair w = rows[r].weights(chunk);
                for (int t = 0; t < TOKENS; ++t) {
                    const float* at = x + t * stride + chunk * CHUNK;
                    total[r][t] += w.first * load<Float>(at);
                    total[r][t] += w.second * load<Float>(at + LANES);
                }
            }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t)
            task.y[(token + t) * task.rows + first + r] = sum(total[r][t]) + (task.bias ? task.bias[first + r] : 0.0f);
}

// As many tokens as make whole tiles; returns the first one that is left.
template <int BITS, int TOKENS>
int64_t multiply_block(const LlmquantLinear& task, const float* arranged, int64_t first, int64_t last, int64_t token) {
    constexpr int ROWS = ACCUMULATORS / TOKENS < BLOCK ? ACCUMULATORS / TOKENS : BLOCK;
    for (; token + TOKENS <= task.tokens; token += TOKENS) {
        int64_t row = first;
        for (; row + ROWS <= last; row += ROWS) multiply_tile<BITS, ROWS, TOKENS>(task, arranged, row, token);
        for (; row < last; ++row) multiply_tile<BITS, 1, TOKENS>(task, arranged, row, token);
    }
    return token;
}

template <int BITS>
void multiply(const LlmquantLinear& task, const float* arranged, int64_t first, int64_t last) {
    for (; first < last; first += BLOCK) {
        const int64_t end = min(last, first + BLOCK);
        int64_t token = multiply_block<BITS, 8>(task, arranged, first, end, 0);
        token = multiply_block<BITS, 4>(task, arranged, first, end, token);
        token = multiply_block<BITS, 2>(task, arranged, first, end, token);
        multiply_block<BITS, 1>(task, arranged, first, end, token);
    }
}

template <int BITS>
void dequantize(const LlmquantLinear& task, int64_t first, int64_t last) {
    const int64_t chunks = padded(task.columns) / CHUNK;
    Row<BITS> row;
    for (int64_t r = first; r < last; ++r) {
        row.open(task, r);
        for (int64_t group = 0, chunk = 0; chunk < chunks; ++group) {
            row.enter(group);
            for (const int64_t end = min(chunks, chunk + ceil_div(task.group, CHUNK)); chunk < end; ++chunk) {
                const Pair w = row.in_order(chunk);
                const int64_t column = chunk * CHUNK, count = min(CHUNK, task.columns - column);
                float* to = task.y + r * task.columns + column;
                if (count == CHUNK)
                    __builtin_memcpy(to, &w, sizeof w);
                else
                    __builtin_memcpy(to, &w, count * sizeof(float));
            }
        }
    }
}

void arrange_any(const LlmquantLinear& task, float* arranged) {
    task.bits == 4 ? arrange<4>(task, arranged) : arrange<8>(task, arranged);
}

void multiply_any(const LlmquantLinear& task, const float* arranged, int64_t first, int64_t last) {
    task.bits == 4 ? multiply<4>(task, arranged, first, last) : multiply<8>(task, arranged, first, last);
}

void dequantize_any(const LlmquantLinear& task, int64_t first, int64_t last) {
    task.bits == 4 ? dequantize<4>(task, first, last) : dequantize<8>(task, first, last);
}

}  // namespace

namespace LLMQUANT_LEVEL {
const LinearKernels linear = {padded, arrange_any, multiply_any, dequantize_any};
}

}  // namespace llmquant
