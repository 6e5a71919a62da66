// The inner loop of GPTQ: the columns of a block, one after the other, errors passed on to those after them.
//
// A thread block owns 32 rows of the weight, 8 threads to a row, each with every eighth column of it in registers; the
// block of the matrix is in shared memory, in the order in which threads read it. All 8 threads of a row round the
// column that is due, and each takes the error from its own.

#include "kernels.h"

namespace llmquant::cuda {
namespace {

constexpr int COLUMNS = 128;  // at most
constexpr int PARTS = 8;      // threads of a row
constexpr int OWN = COLUMNS / PARTS;
constexpr int ROWS = 32;
constexpr int THREADS = ROWS * PARTS;
// Of what one thread reads of a row of the matrix: so that those of 8 threads are in different banks.
constexpr int STRIDE = OWN + 4;

constexpr float SMALLEST_SCALE = 1.0f / 16384;  // the smallest normal fp16
constexpr float LARGEST_SCALE = 65280.0f;       // the largest value exact in both fp16 and bf16

struct Shared {
    Floats matrix[COLUMNS][PARTS][STRIDE / 4];  // right of the diagonal; zero elsewhere
    float pivots[COLUMNS];
};

struct Grid {
    float scale, zero;
};

__device__ __forceinline__ float code_of(float x, const Grid& grid, float top) {
    return fminf(fmaxf(rintf(x / grid.scale) + grid.zero, 0.0f), top);
}

__device__ __forceinline__ float representable(float scale) {
    const float rounded = to_float<Bf16>(to_pair<Bf16>(scale, 0));
    return fminf(fmaxf(rounded, SMALLEST_SCALE), LARGEST_SCALE);
}

// `solve.grid.grid_over`.
__device__ __forceinline__ Grid grid_over(const LlmquantCudaColumns& task, float low, float high,
                                          const float* candidate) {
    const float top = static_cast<float>((1 << task.bits) - 1), middle = static_cast<float>(1 << (task.bits - 1));
    low *= candidate[0];
    high *= candidate[1];
    if (!task.symmetric) {
        const float scale = (high - low) * (1.0f / top);
        return {representable(scale), fminf(fmaxf(rintf(-low / fmaxf(scale, SMALLEST_SCALE)), 0.0f), top)};
    }
    const float sign = candidate[2], longer = sign > 0 ? -low : high, shorter = sign > 0 ? high : -low;
    return {representable(fmaxf(longer * (1.0f / middle), shorter * (1.0f / (middle - 1)))) * sign, middle};
}

// One row, seen by one of its threads.
struct Row {
    const LlmquantCudaColumns& task;
    const Shared& shared;
    int part;
    float top;

    // Rounds column 8 I + p, and takes its error from all of this thread's columns before 4 * `end`.
    template <int I>
    __device__ __forceinline__ float take(float (&w)[OWN], int p, const Grid& grid, int end, float* code) const {
        const float x = shuffle(w[I], p, PARTS);
        *code = code_of(x, grid, top);
        const float error = (x - (*code - grid.zero) * grid.scale) * shared.pivots[PARTS * I + p];
        if (part == p) w[I] = error;  // nothing is taken from it any more: the matrix is zero there
#pragma unroll
        for (int v = I / 4; v < OWN / 4; ++v)
            if (v < end) {
                const Floats row = shared.matrix[PARTS * I + p][part][v];
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (4 * v + k >= I) w[4 * v + k] -= error * row.value[k];
            }
        return error;
    }

    // The sum of squared errors of a group on a grid, columns 8 I to 32 `end`.
    template <int I>
    __device__ void try_columns(float (&w)[OWN], const Grid& grid, int end, float* loss) const {
        if constexpr (I < OWN) {
            if (I < 4 * end) {
                float code;
#pragma unroll 1
                for (int p = 0; p < PARTS; ++p) {
                    const float error = take<I>(w, p, grid, end, &code);
                    *loss += error * error;
                }
                try_columns<I + 1>(w, grid, end, loss);
            }
        }
    }

    // The best of the candidates for columns 8 I to 32 `end`, which are one group.
    template <int I>
    __device__ Grid search(const float (&w)[OWN], int end) const {
        float low = 0, high = 0;
#pragma unroll
        for (int i = I; i < OWN; ++i)
            if (i < 4 * end) {
                low = fminf(low, w[i]);
                high = fmaxf(high, w[i]);
            }
#pragma unroll
        for (int mask = 1; mask < PARTS; mask *= 2) {
            low = fminf(low, shuffle_xor(low, mask));
            high = fmaxf(high, shuffle_xor(high, mask));
        }
        Grid best = grid_over(task, low, high, task.candidates);
        float least = INFINITY;
#pragma unroll 1
        for (int64_t c = 0; c < task.candidate_count; ++c) {
            const Grid grid = grid_over(task, low, high, task.candidates + 3 * c);
            float rest[OWN], loss = 0;
#pragma unroll
            for (int i = 0; i < OWN; ++i) rest[i] = w[i];
            try_columns<I>(rest, grid, end, &loss);
            if (loss < least) {
                least = loss;
                best = grid;
            }
        }
        return best;
    }

    // All columns from 8 I on. `grid` is the group's that has begun, if grids are searched for.
    template <int I>
    __device__ void round(float (&w)[OWN], int64_t row, bool write, Grid grid) const {
        if constexpr (I < OWN) {
            if (PARTS * I >= task.columns) return;
            const int64_t column = PARTS * I + part, mine = column / task.group * task.rows + row;
            const bool there = column < task.columns;
            if (!task.candidates) {
                grid = there ? Grid{task.scales[mine], task.zeros[mine]} : Grid{1, 0};
            } else if constexpr (I % 4 == 0) {
                if (PARTS * I % task.group == 0) {
                    const int64_t end = min(PARTS * I + task.group, task.columns + 31) / 32;
                    grid = search<I>(w, static_cast<int>(end));
                    if (write && part == 0) {
                        task.scales[mine] = grid.scale;
                        task.zeros[mine] = grid.zero;
                    }
                }
            }
#pragma unroll 1
            for (int p = 0; p < PARTS && PARTS * I + p < task.columns; ++p) {
                const Grid due = {shuffle(grid.scale, p, PARTS), shuffle(grid.zero, p, PARTS)};
                float code;
                take<I>(w, p, due, OWN / 4, &code);
                if (write && part == p) task.codes[(PARTS * I + p) * task.rows + row] = static_cast<uint8_t>(code);
            }
            round<I + 1>(w, row, write, grid);
        }
    }
};

__global__ void __launch_bounds__(THREADS, 1) round_block(LlmquantCudaColumns task) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int thread = thread_index();
    for (int i = thread; i < COLUMNS * COLUMNS; i += THREADS) {
        const int j = i / COLUMNS, l = i % COLUMNS;
        const bool read = j < l && l < task.columns;
        shared.matrix[j][l % PARTS][l / PARTS / 4].value[l / PARTS % 4] = read ? task.matrix[j * task.stride + l] : 0;
    }
    for (int j = thread; j < COLUMNS; j += THREADS) shared.pivots[j] = j < task.columns ? task.pivots[j] : 0;
    sync_block();

    const int part = thread % PARTS;
    const int64_t wanted = int64_t{block_index()} * ROWS + thread / PARTS;
    const bool write = wanted < task.rows;
    const int64_t row = write ? wanted : task.rows - 1;  // rows that are not there do as the last one
    float w[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int64_t column = PARTS * i + part;
        w[i] = column < task.columns ? task.work[column * task.rows + row] : 0;
    }
    const Row owner = {task, shared, part, static_cast<float>((1 << task.bits) - 1)};
    owner.round<0>(w, row, write, Grid{1, 0});
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int64_t column = PARTS * i + part;
        if (write && column < task.columns) task.work[column * task.rows + row] = w[i];
    }
}

}  // namespace

int64_t start_round_columns(const LlmquantCudaColumns& task, void* stream) {
    const int64_t blocks = rounded_up(task.rows, ROWS) / ROWS;
    return launch(round_block, {blocks, THREADS, static_cast<int>(sizeof(Shared)), false, stream}, task);
}

}  // namespace llmquant::cuda
