// Products on Hopper (sm_90a): weights go through registers to the tensor cores of a warpgroup, and activations there
// from shared memory, where the copy engine puts both.
//
// A block computes a tile of 256 rows and 8 to 128 tokens, one chunk of 128 columns after the other. One warp does
// nothing but ask for chunks, as many ahead as shared memory holds. The other eight are two warpgroups. Warp w of each
// has tile w of 64 rows: an instruction multiplies 64 rows, 16 of each warp, and which 16 is free to choose, so word j
// of the codes is matrix A of instruction j, as it lies in memory. The first warpgroup has words 0 and 1 of every lane,
// the second 2 and 3.
//
// While the tensor cores multiply one step, a warp makes numbers of the codes of the next.

#include "finish.h"

namespace llmquant::cuda {
namespace {

constexpr int TILES = 4, ROWS = TILES * TILE;
constexpr int GROUPS = 2;  // warpgroups
constexpr int OWN = WORDS / GROUPS;
constexpr int CONSUMERS = GROUPS * 4 * LANES, THREADS = CONSUMERS + 4 * LANES;
constexpr int STEPS = 8, COLUMNS = STEPS * STEP;  // of a chunk
constexpr int BOX = 64;                           // columns of activations that are copied at once: 128 bytes
constexpr int GRIDS = COLUMNS / 32;               // groups of a chunk, at most
constexpr int ROOM = 226 * 1024;                  // of a block

static_assert(PAD_COLUMNS % COLUMNS == 0, "chunks are whole");
static_assert(GROUPS * OWN == WORDS && TILES == 4, "a warp of a warpgroup to a tile");

template <int TOKENS>
struct alignas(1024) Stage {
    Words x[COLUMNS / BOX][TOKENS * BOX / GRANULE];
    Words codes[TILES][STEPS * LANES];
    Words scales[TILES][GRIDS][8];
    uint32_t zeros[TILES][GRIDS][8];
};

constexpr int stages_of(int bytes) { return ROOM / bytes < 8 ? ROOM / bytes : 8; }
template <int TOKENS>
constexpr int STAGES = stages_of(sizeof(Stage<TOKENS>));

template <int TOKENS>
struct Shared {
    Stage<TOKENS> stages[STAGES<TOKENS>];
    Barrier full[STAGES<TOKENS>], empty[STAGES<TOKENS>];
    int word;
};

// Where a warp stands in the ring of stages. A barrier's phase changes its parity with every round.
template <int TOKENS>
struct Place {
    int stage = 0, parity = 0;

    __device__ void advance() {
        if (++stage == STAGES<TOKENS>) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Task {
    Product product;
    BoxMap x;
    int token_tiles;
};

// ---- the warp that asks

template <int TOKENS, bool ZEROS>
struct Source {
    const Task& task;
    Shared<TOKENS>& shared;

    __device__ int row_tile(int tile) const { return tile / task.token_tiles; }
    __device__ int tiles_of(int tile) const {
        return min(TILES, task.product.weight.layout.tiles - row_tile(tile) * TILES);
    }

    // What belongs to the weight, and how many bytes are to come in all.
    __device__ void ask_for_weight(int stage, int tile, int chunk) const {
        const Weight& weight = task.product.weight;
        const Layout& layout = weight.layout;
        const int tiles = tiles_of(tile), first = chunk * STEPS >> layout.shift;
        const int groups = max(1, STEPS >> layout.shift);
        Stage<TOKENS>& to = shared.stages[stage];
        Barrier* full = &shared.full[stage];
        constexpr int CODES = STEPS * LANES * int{sizeof(Words)};
        const int scales = groups * TILE * 2, zeros = ZEROS ? groups * TILE / 2 : 0;
        expect_bytes(full, int{sizeof(to.x)} + tiles * (CODES + scales + zeros));
        const uint64_t policy = task.token_tiles == 1 ? evict_first() : evict_normal();
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            const int of_weight = row_tile(tile) * TILES + i;
            const int64_t grid = grid_at(layout.groups, of_weight, first) / 8;
            copy_bulk(to.codes[i], weight.codes + words_at(layout.steps, of_weight, chunk * STEPS, 0), CODES, full,
                      policy);
            copy_bulk(to.scales[i], weight.scales + grid, scales, full, policy);
            if (ZEROS) copy_bulk(to.zeros[i], weight.zeros + grid, zeros, full, policy);
        }
    }

    __device__ void ask_for_x(int stage, int tile, int chunk) const {
        const int token = tile % task.token_tiles * TOKENS;
        for (int i = 0; i < COLUMNS / BOX; ++i)
            copy_box(shared.stages[stage].x[i], task.x, chunk * COLUMNS + i * BOX, token, &shared.full[stage]);
    }

    // By one thread: every chunk of this block, in order.
    __device__ void run() const {
        const Schedule& schedule = task.product.schedule;
        const int begin = first_unit(schedule, block_index()), end = first_unit(schedule, block_index() + 1);
        const int ahead = min(begin + STAGES<TOKENS>, end);
        const auto tile = [&](int unit) { return unit / schedule.chunks; };
        const auto chunk = [&](int unit) { return unit % schedule.chunks; };
#pragma unroll 1
        for (int unit = begin; unit < ahead; ++unit) ask_for_weight(unit - begin, tile(unit), chunk(unit));
        if (task.product.overlap) await_previous();  // x may come from it; the weight does not
#pragma unroll 1
        for (int unit = begin; unit < ahead; ++unit) ask_for_x(unit - begin, tile(unit), chunk(unit));
        Place<TOKENS> place;
#pragma unroll 1
        for (int unit = ahead; unit < end; ++unit) {
            await_phase(&shared.empty[place.stage], place.parity);
            ask_for_weight(place.stage, tile(unit), chunk(unit));
            ask_for_x(place.stage, tile(unit), chunk(unit));
            place.advance();
        }
    }
};

// ---- the warps that multiply

// What a warp needs beside codes, for the words that it has: of a group.
struct Grid {
    uint32_t scales[OWN][2];  // each twice
    Offsets offsets[OWN][2];
};

template <class T>
__device__ __forceinline__ uint32_t twice(uint32_t scales, int b) {
    return b ? pick_bytes(scales, 0x3232) : pick_bytes(scales, 0x1010);
}

template <class T, bool ZEROS>
__device__ __forceinline__ void load_grid(Grid& grid, const Words (&scales)[8], const uint32_t (&zeros)[8], int lane,
                                          int group) {
    const Pair pair = *reinterpret_cast<const Pair*>(&scales[lane / 4].word[group * OWN]);
    const uint32_t own = ZEROS ? zeros[lane / 4] : MIDPOINTS;
#pragma unroll
    for (int j = 0; j < OWN; ++j)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            grid.scales[j][b] = twice<T>(pair.word[j], b);
            grid.offsets[j][b] = ZEROS ? offsets_of<T>(own >> 8 * OWN * group, j, b) : T::offsets(8);
        }
}

// Matrix A of one word: weights, rounded once.
template <class T>
__device__ __forceinline__ void to_scaled(uint32_t word, const Grid& grid, int j, uint32_t (&a)[4]) {
    constexpr uint32_t MINUS_ZERO = 0x80008000;  // what changes no product that it is added to
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const uint32_t whole = fma2<T>(merge(word >> T::shift(r), T::mask(r), T::BASE), T::factor(r),
                                       T::offset(grid.offsets[j][r % 2], r));
        a[r] = fma2<T>(whole, grid.scales[j][r % 2], MINUS_ZERO);
    }
}

template <int TOKENS>
using Sums = float[OWN][TOKENS / 2];

// Where a thread stands.
struct Part {
    int thread = thread_index();  // of those that multiply
    int lane = thread % LANES, warp = thread / LANES % 4, group = thread / LANES / 4;

    // In a tile.
    __device__ int row(int j, int r) const { return warp * TILE + 16 * (group * OWN + j) + sum_row(lane, r); }
};

template <class T, bool ZEROS, int TOKENS>
__device__ __forceinline__ void multiply(Shared<TOKENS>& shared, int shift, int chunks, Place<TOKENS>& place,
                                         Sums<TOKENS>& sums) {
    const Part part;
    int before = 0;  // the stage
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Stage<TOKENS>& stage = shared.stages[place.stage];
        await_phase(&shared.full[place.stage], place.parity);
        const uint64_t x = matrix_of(stage.x);
        Grid grid;
        uint32_t a[2][OWN][4];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (step % 2 == 0) {  // no group is shorter
                const int group = step >> shift;
                load_grid<T, ZEROS>(grid, stage.scales[part.warp][group], stage.zeros[part.warp][group], part.lane,
                                    part.group);
            }
            const Pair codes = *reinterpret_cast<const Pair*>(
                &stage.codes[part.warp][step * LANES + part.lane].word[part.group * OWN]);
#pragma unroll
            for (int j = 0; j < OWN; ++j) to_scaled<T>(codes.word[j], grid, j, a[step % 2][j]);
            begin_group();
#pragma unroll
            for (int j = 0; j < OWN; ++j)
                multiply_add_group<T, TOKENS>(sums[j], a[step % 2][j],
                                              matrix_at(x, step * STEP / BOX * TOKENS * BOX * 2 + step * STEP % BOX * 2));
            commit_group();
            await_groups<1>();  // the step before is done: its numbers are no longer needed, nor the stage before
            if (step == 0 && chunk > 0 && part.lane == 0) arrive(&shared.empty[before]);
        }
        before = place.stage;
        place.advance();
    }
    await_groups<0>();
    if (part.lane == 0) arrive(&shared.empty[before]);
}

// Leaves this block's sums in the workspace; the last block of the tile finds in `sums` those of all, and true.
template <int TOKENS>
__device__ __forceinline__ bool add_blocks(const Product& product, const Segment& segment, Shared<TOKENS>& shared,
                                           Sums<TOKENS>& sums) {
    constexpr int FOURS = OWN * TOKENS / 8;
    const Schedule& schedule = product.schedule;
    const auto slot = [&](int block, bool begins_tile) {
        return product.partials + (int64_t{slot_of(block, begins_tile)} * FOURS * CONSUMERS + thread_index());
    };
    Floats* own = slot(block_index(), segment.begin == 0);
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
        const float* four = &sums[i / (TOKENS / 8)][i % (TOKENS / 8) * 4];
        own[i * CONSUMERS] = {{four[0], four[1], four[2], four[3]}};
    }
    const auto sync = [] { sync_threads<CONSUMERS>(); };
    if (!is_last(product, segment.tile, &shared.word, sync)) return false;
    const int first = first_block(schedule, segment.tile), last = last_block(schedule, segment.tile);
#pragma unroll 1
    for (int block = first; block <= last; ++block) {
        const Floats* other = slot(block, block == first);
#pragma unroll
        for (int i = 0; i < FOURS; ++i) {
            const Floats more = load_fresh(other + i * CONSUMERS);
            float* four = &sums[i / (TOKENS / 8)][i % (TOKENS / 8) * 4];
#pragma unroll
            for (int r = 0; r < 4; ++r) four[r] = (block == first ? 0 : four[r]) + more.value[r];
        }
    }
    return true;
}

// Sums of a lane are of one row and two tokens; transposed, of one token and two rows.
template <class T, int TOKENS>
__device__ __forceinline__ void write(const Product& product, int row_tile, int token_tile, const Sums<TOKENS>& sums) {
    const Part part;
    const int rows = product.weight.layout.rows, first_row = row_tile * ROWS;
#pragma unroll
    for (int j = 0; j < OWN; ++j)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const int of_sums = first_row + part.row(j, 2 * b);
            const float bias = of_sums < rows ? bias_at(product, of_sums) : 0;
            const int row = of_sums - part.lane / 4 + part.lane % 4 * 2;  // after they are transposed
#pragma unroll
            for (int i = 0; i < TOKENS / 8; ++i) {
                const float* two = &sums[j][4 * i + 2 * b];
                const uint32_t pair = transpose_matrix(to_pair<T>(two[0] + bias, two[1] + bias));
                const int token = token_tile * TOKENS + 8 * i + part.lane / 4;
                if (token >= product.tokens) continue;
                uint16_t* y = product.y + int64_t{token} * rows + row;
                if (row + 1 < rows && rows % 2 == 0) {
                    *reinterpret_cast<uint32_t*>(y) = pair;
                } else {
                    if (row < rows) y[0] = static_cast<uint16_t>(pair);
                    if (row + 1 < rows) y[1] = static_cast<uint16_t>(pair >> 16);
                }
            }
        }
}

template <class T, bool ZEROS, int TOKENS>
__device__ __forceinline__ void consume(const Task& task, Shared<TOKENS>& shared) {
    const Product& product = task.product;
    Place<TOKENS> place;
    for (int unit = first_unit(product.schedule, block_index()); has_unit(product.schedule, block_index(), unit);) {
        const Segment segment = segment_at(product.schedule, block_index(), unit);
        Sums<TOKENS> sums = {};
        multiply<T, ZEROS, TOKENS>(shared, product.weight.layout.shift, segment.end - segment.begin, place, sums);
        if (is_whole(product.schedule, segment) || add_blocks<TOKENS>(product, segment, shared, sums))
            write<T, TOKENS>(product, segment.tile / task.token_tiles, segment.tile % task.token_tiles, sums);
        unit = unit_after(product.schedule, segment);
    }
}

template <class T, bool ZEROS, int TOKENS>
__global__ void __launch_bounds__(THREADS, 1) multiply_groups(const __grid_constant__ Task task) {
#ifdef LLMQUANT_WGMMA
    let_next_begin();
    Shared<TOKENS>& shared = *reinterpret_cast<Shared<TOKENS>*>(shared_memory());
    if (thread_index() == 0) {
        for (int i = 0; i < STAGES<TOKENS>; ++i) {
            begin_barrier(&shared.full[i], 1);
            begin_barrier(&shared.empty[i], CONSUMERS / LANES);
        }
        fence_barriers();
    }
    sync_block();
    if (thread_index() < CONSUMERS) {
        take_registers<232>();
        consume<T, ZEROS, TOKENS>(task, shared);
    } else {
        leave_registers<40>();
        if (thread_index() == CONSUMERS) Source<TOKENS, ZEROS>{task, shared}.run();
    }
#else
    trap();  // compiled for another device than the only one that this runs on
#endif
}

template <int COUNT_>
struct Tokens {
    static constexpr int COUNT = COUNT_;
};

// `with` gets the smallest number of tokens of a tile that so many fit into, or the largest.
template <class With>
auto choose_tokens(int64_t tokens, With with) {
    if (tokens <= 8) return with(Tokens<8>());
    if (tokens <= 16) return with(Tokens<16>());
    if (tokens <= 32) return with(Tokens<32>());
    if (tokens <= 64) return with(Tokens<64>());
    return with(Tokens<128>());
}

int64_t tiles_of_tokens(int64_t tokens) {
    return choose_tokens(tokens, [&](auto tile) { return rounded_up(tokens, tile.COUNT) / tile.COUNT; });
}

Schedule schedule(const Layout& layout, int64_t tokens, const Device& device) {
    const int64_t tiles = rounded_up(layout.tiles, TILES) / TILES * tiles_of_tokens(tokens);
    return schedule_of(tiles, layout.steps / STEPS, device.processors);
}

int64_t tile_bytes(int64_t tokens) {
    return choose_tokens(tokens, [](auto tile) { return int64_t{ROWS} * tile.COUNT * int64_t{sizeof(float)}; });
}

int64_t start(const Product& product, int64_t kind, void* stream) {
    return choose_tokens(product.tokens, [&](auto tile) -> int64_t {
        constexpr int TOKENS = decltype(tile)::COUNT;
        const bool fp16 = kind == LLMQUANT_CUDA_FP16;
        Task task = {product, {}, static_cast<int>(tiles_of_tokens(product.tokens))};
        const Boxes boxes = {product.x, product.weight.layout.columns, product.tokens, product.x_stride, BOX, TOKENS, fp16};
        if (const int64_t error = map_boxes(boxes, &task.x)) return error;
        void (*const kernel)(Task) = product.weight.zeros
                                         ? fp16 ? multiply_groups<Fp16, true, TOKENS> : multiply_groups<Bf16, true, TOKENS>
                                     : fp16 ? multiply_groups<Fp16, false, TOKENS>
                                            : multiply_groups<Bf16, false, TOKENS>;
        const int bytes = static_cast<int>(sizeof(Shared<TOKENS>));
        return launch(kernel, {product.schedule.blocks, THREADS, bytes, product.overlap, stream}, task);
    });
}

}  // namespace

const Path wgmma = {schedule, tile_bytes, start};

}  // namespace llmquant::cuda
