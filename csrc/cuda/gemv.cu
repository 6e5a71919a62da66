// Products of at most 8 tokens: the weights stream by once, at the speed of memory.
//
// A warp walks along the columns of one tile. Its codes go from memory to registers, two units of 64 columns ahead of
// their use, so 4 KB to a warp are always on their way; nothing waits at a barrier. Tokens are the 8 columns of B: one
// kernel serves 1 to 8 of them. Activations, scales and zeros take the way through shared memory, as far ahead, into a
// ring that is the warp's own. Sums are of integers until their group ends; then they get their scale, in fp32.
//
// Where several blocks share a tile, their sums are added up in one of two ways: by way of memory (`stream`), or inside
// of a cluster (`stream_in_cluster`).

#include "finish.h"
#include "hopper.h"

namespace llmquant::cuda {
namespace {

constexpr int ROW_WARPS = 2, COLUMN_WARPS = 4;
constexpr int THREADS = ROW_WARPS * COLUMN_WARPS * LANES;
constexpr int AT_ONCE = 2;  // blocks of a multiprocessor: by registers
constexpr int ROWS = ROW_WARPS * TILE;
constexpr int TOKENS = 8;
constexpr int STEPS = 4;  // of a unit
constexpr int COLUMNS = STEPS * STEP;
constexpr int GRANULES = COLUMNS / GRANULE;
constexpr int RING = 3;           // units in shared memory
constexpr int AHEAD = 2;          // units in registers
constexpr int RESTART = 24;       // what a second tile costs a block, in units
constexpr int STRIDE = TILE + 4;  // of a token's sums in shared memory: so that a warp writes to different banks

static_assert(ROWS == PAD_ROWS && PAD_COLUMNS % COLUMNS == 0, "tiles and units are whole");

// What a unit needs beside its codes.
struct Unit {
    Words x[TOKENS * GRANULES];
    Words scales[2][8];  // of one group, or of two, if they are of 32 columns
    uint32_t zeros[2][8];
};

struct Shared {
    union Own {  // of a warp
        Unit ring[RING];
        float sums[TOKENS * STRIDE];
    } own[ROW_WARPS * COLUMN_WARPS];
    int word;
};
static_assert(sizeof(Unit) % 16 == 0 && sizeof(Shared) <= 48 * 1024, "it fits without asking for more");

template <class T, bool ZEROS>
struct Walk {
    const Product& product;
    Unit* ring;
    int tile, lane;
    bool narrow;  // two groups to a unit
    float sums[WORDS][4];

    // Starts the copies of a unit, which are one group; of no unit, an empty one.
    __device__ void stage(int unit, int end, int slot) const {
        if (unit < end) {
            const Layout& layout = product.weight.layout;
            Unit& to = ring[slot];
            // What stands where there is no token is multiplied, too, and never read.
#pragma unroll 1  // unrolled, its addresses take the registers of codes
            for (unsigned i = lane; i < static_cast<unsigned>(product.tokens * GRANULES); i += LANES) {
                const int token = i / GRANULES, granule = i % GRANULES;
                copy_granule(product, token, unit * COLUMNS + granule * GRANULE,
                             &to.x[activations_at(GRANULES, token, granule)]);
            }
            const int64_t grid = grid_at(layout.groups, tile, unit * STEPS >> layout.shift) / 8;
            const int groups = narrow ? 2 : 1;
            if (lane < 8 * groups) copy_async(&to.scales[0][lane], product.weight.scales + grid + lane, 16);
            if (ZEROS && lane < 2 * groups)
                copy_async(&to.zeros[0][4 * lane], product.weight.zeros + grid + 4 * lane, 16);
        }
        commit_copies();
    }

    __device__ const Words* codes_of(int unit) const {
        return product.weight.codes + words_at(product.weight.layout.steps, tile, unit * STEPS, lane);
    }

    __device__ void load(int unit, int end, uint64_t policy, Words (&codes)[STEPS]) const {
        const Words* from = codes_of(unit);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) load_once(codes[step], from + step * LANES, unit < end, policy);
    }

    // One unit. Its codes make room, one step after the other, for those of the unit that is AHEAD.
    __device__ void take(int unit, int end, int slot, uint64_t policy, Words (&codes)[STEPS]) {
        await_copies<1>();
        sync_warp();  // the copies of all lanes are there, and none reads the unit before any more
        stage(unit + RING - 1, end, slot == 0 ? RING - 1 : slot - 1);
        const Unit& staged = ring[slot];
        const Words* next = codes_of(unit + AHEAD);

        float fresh[WORDS][4] = {};
        uint32_t b[4];  // of two steps
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int group = narrow ? step / 2 : 0;
            const uint32_t zeros = ZEROS ? staged.zeros[group][lane / 4] : MIDPOINTS;
            if (step % 2 == 0)
                load_matrices(
                    b,
                    &staged.x[activations_at(GRANULES, gemv_matrix_token(lane), 2 * step + gemv_matrix_granule(lane))]);
#pragma unroll
            for (int j = 0; j < WORDS; ++j) {
                uint32_t a[4];
                to_integers<T>(codes[step].word[j], zeros, j, a);
                multiply_add<T>(fresh[j], a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
            }
            load_once(codes[step], next + step * LANES, unit + AHEAD < end, policy);
            if (step == STEPS - 1 || (step == 1 && narrow)) add(staged.scales[group][lane / 4], fresh);
        }
    }

    // A group, or its part in this unit, has ended.
    __device__ void add(const Words& scales, float (&fresh)[WORDS][4]) {
#pragma unroll
        for (int j = 0; j < WORDS; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                sums[j][r] += scale_of<T>(scales, j, r / 2) * fresh[j][r];
                fresh[j][r] = 0;
            }
    }

    // Units [begin, end).
    __device__ void walk(int begin, int end) {
        const uint64_t policy = evict_first();
        Words codes[AHEAD][STEPS] = {};
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) load(begin + ahead, end, policy, codes[ahead]);
        if (product.overlap) await_previous();  // x may come from it; the codes do not
        for (int ahead = 0; ahead < RING - 1; ++ahead) stage(begin + ahead, end, ahead);
#pragma unroll 1
        for (int unit = begin, slot = 0; unit < end; unit += AHEAD) {
#pragma unroll
            for (int ahead = 0; ahead < AHEAD; ++ahead) {
                if (ahead && unit + ahead == end) return;
                take(unit + ahead, end, slot, policy, codes[ahead]);
                slot = slot == RING - 1 ? 0 : slot + 1;
            }
        }
    }
};

// What each thread answers for at the end: one row, and every other token.
constexpr int PARTS = THREADS / ROWS;
static_assert(TOKENS % PARTS == 0, "threads share the tokens equally");

template <class T>
__device__ void write(const Product& product, int tile, const float (&sums)[TOKENS / PARTS]) {
    const int row = tile * ROWS + thread_index() % ROWS, rows = product.weight.layout.rows;
    if (row >= rows) return;
    const float bias = bias_at(product, row);
#pragma unroll
    for (int i = 0; i < TOKENS / PARTS; ++i) {
        const int token = thread_index() / ROWS + i * PARTS;
        if (token < product.tokens)
            product.y[int64_t{token} * rows + row] = static_cast<uint16_t>(to_pair<T>(sums[i] + bias, 0));
    }
}

// This thread's sums of a tile in a slot of the workspace.
__device__ __forceinline__ float* partials_at(const Product& product, int slot) {
    return &product.partials->value[0] + int64_t{slot} * TOKENS * ROWS + thread_index();
}

// What this block's warps have left, added up.
__device__ __forceinline__ void add_up(const Shared& shared, float (&sums)[TOKENS / PARTS]) {
    const int row = thread_index() % ROWS;
    sync_block();
#pragma unroll
    for (int i = 0; i < TOKENS / PARTS; ++i) {
        const int token = thread_index() / ROWS + i * PARTS;
        sums[i] = 0;
#pragma unroll
        for (int warp = 0; warp < COLUMN_WARPS; ++warp)
            sums[i] += shared.own[row / TILE * COLUMN_WARPS + warp].sums[token * STRIDE + row % TILE];
    }
}

template <class T>
__device__ void finish(const Product& product, const Segment& segment, Shared& shared) {
    const Schedule& schedule = product.schedule;
    float sums[TOKENS / PARTS];
    add_up(shared, sums);
    if (!is_whole(schedule, segment)) {
        float* own = partials_at(product, slot_of(block_index(), segment.begin == 0));
#pragma unroll
        for (int i = 0; i < TOKENS / PARTS; ++i)
            if (i * PARTS < product.tokens) own[i * THREADS] = sums[i];
        if (!is_last(product, segment.tile, &shared.word)) return;
#pragma unroll
        for (int i = 0; i < TOKENS / PARTS; ++i) sums[i] = 0;
        const int first = first_block(schedule, segment.tile), last = last_block(schedule, segment.tile);
        for (int block = first; block <= last; ++block) {
            const float* other = partials_at(product, slot_of(block, block == first));
#pragma unroll
            for (int i = 0; i < TOKENS / PARTS; ++i)
                if (i * PARTS < product.tokens) sums[i] += load_fresh(other + i * THREADS);
        }
    }
    write<T>(product, segment.tile, sums);
}

// Walks this block's chunks of a tile, and leaves the sums of each warp in shared memory.
template <class T, bool ZEROS>
__device__ __forceinline__ void sum_up(const Product& product, const Segment& segment, Shared& shared) {
    const int thread = thread_index(), warp = thread / LANES, lane = thread % LANES;
    const int count = segment.end - segment.begin, part = warp % COLUMN_WARPS;
    Walk<T, ZEROS> walk = {product,
                           shared.own[warp].ring,
                           segment.tile * ROW_WARPS + warp / COLUMN_WARPS,
                           lane,
                           product.weight.layout.shift == 1,
                           {}};
    walk.walk(segment.begin + count * part / COLUMN_WARPS, segment.begin + count * (part + 1) / COLUMN_WARPS);
    sync_warp();  // the ring becomes room for sums
#pragma unroll
    for (int j = 0; j < WORDS; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            shared.own[warp].sums[sum_token(lane, r) * STRIDE + 16 * j + sum_row(lane, r)] = walk.sums[j][r] * T::WORTH;
}

template <class T, bool ZEROS>
__global__ void __launch_bounds__(THREADS, AT_ONCE) stream(Product product) {
    let_next_begin();
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    for (int done = 0; done < units_of(product.schedule, block_index());) {
        const Segment segment = segment_at(product.schedule, block_index(), done);
        sum_up<T, ZEROS>(product, segment, shared);
        finish<T>(product, segment, shared);
        sync_block();  // the sums become room for the ring
        done += segment.end - segment.begin;
    }
}

// Each block has at least a unit for each of its warps.
Schedule schedule(const Layout& layout, int64_t, const Device& device) {
    const int64_t tiles = layout.tiles / ROW_WARPS, chunks = layout.steps / STEPS;
    const int64_t most = (tiles * chunks + COLUMN_WARPS - 1) / COLUMN_WARPS;
    return schedule_of(tiles, chunks, min(int64_t{AT_ONCE} * device.processors, most), RESTART);
}

int64_t tile_bytes(int64_t) { return TOKENS * ROWS * int64_t{sizeof(float)}; }

int64_t start(const Product& product, int64_t kind, void* stream_of_task) {
    const bool fp16 = kind == LLMQUANT_CUDA_FP16;
    void (*const kernel)(Product) = product.weight.zeros ? fp16 ? stream<Fp16, true> : stream<Bf16, true>
                                    : fp16               ? stream<Fp16, false>
                                                         : stream<Bf16, false>;
    return launch(kernel, {product.schedule.blocks, THREADS, sizeof(Shared), product.overlap, stream_of_task}, product);
}

// The blocks of a tile as a cluster. Each answers for some of the rows at the end, and is sent what the others have
// summed for them: no way through memory, and no tickets.
struct Gathering {
    Shared shared;
    Barrier arrived;            // all sums are there
    float sums[TOKENS * ROWS];  // [blocks][TOKENS][rows of a block]
};
static_assert(sizeof(Gathering) <= 48 * 1024, "it fits without asking for more");

template <class T>
__device__ void write_gathered(const Product& product, const float* sums) {
    const int blocks = blocks_of_cluster(), rows = ROWS >> shift_of(blocks);
    const int first = cluster_index() * ROWS + rank_in_cluster() * rows, end = product.weight.layout.rows;
#pragma unroll 1
    for (int i = thread_index(); i < rows * product.tokens; i += THREADS) {
        const int token = i * blocks / ROWS, row = i % ROWS & (rows - 1);
        float sum = 0;
        for (int from = 0; from < blocks; ++from) sum += sums[(from * TOKENS + token) * rows + row];
        if (first + row >= end) continue;
        sum += bias_at(product, first + row);
        product.y[int64_t{token} * end + first + row] = static_cast<uint16_t>(to_pair<T>(sum, 0));
    }
}

template <class T, bool ZEROS>
__global__ void __launch_bounds__(THREADS, AT_ONCE) stream_in_cluster(Product product) {
#ifdef LLMQUANT_CLUSTERS
    let_next_begin();
    Gathering& own = *reinterpret_cast<Gathering*>(shared_memory());
    if (thread_index() == 0) {
        begin_barrier(&own.arrived, 1);
        fence_barriers();
        expect_bytes(&own.arrived, product.tokens * ROWS * static_cast<int>(sizeof(float)));
    }
    sync_warp();
    arrive_in_cluster();  // I am here: others may write to my memory
    sum_up<T, ZEROS>(product, part_of(product.schedule, cluster_index(), rank_in_cluster(), blocks_of_cluster()),
                     own.shared);
    float sums[TOKENS / PARTS];
    add_up(own.shared, sums);

    const int blocks = blocks_of_cluster(), rows = ROWS >> shift_of(blocks), row = thread_index() % ROWS;
    await_cluster();
#pragma unroll
    for (int i = 0; i < TOKENS / PARTS; ++i) {
        const int token = thread_index() / ROWS + i * PARTS;
        if (token < product.tokens)
            send(&own.sums[(rank_in_cluster() * TOKENS + token) * rows + (row & (rows - 1))], row * blocks / ROWS,
                 sums[i], &own.arrived);
    }
    await_sent(&own.arrived);  // nobody writes here any more: the block may end when it has read
    write_gathered<T>(product, own.sums);
#endif
}

Schedule cluster_schedule(const Layout& layout, int64_t, const Device& device) {
    return cluster_schedule_of(layout.tiles / ROW_WARPS, layout.steps / STEPS, device.clusters[AT_ONCE - 1],
                               COLUMN_WARPS);
}

int64_t no_bytes(int64_t) { return 0; }

int64_t start_cluster(const Product& product, int64_t kind, void* stream_of_task) {
    const bool fp16 = kind == LLMQUANT_CUDA_FP16;
    void (*const kernel)(Product) = product.weight.zeros
                                        ? fp16 ? stream_in_cluster<Fp16, true> : stream_in_cluster<Bf16, true>
                                    : fp16 ? stream_in_cluster<Fp16, false>
                                           : stream_in_cluster<Bf16, false>;
    return launch(kernel,
                  {product.schedule.blocks, THREADS, sizeof(Gathering), product.overlap, stream_of_task,
                   cluster_of(product.schedule), true},
                  product);
}

}  // namespace

const Path gemv = {schedule, tile_bytes, start};
const Path cluster = {cluster_schedule, no_bytes, start_cluster};

}  // namespace llmquant::cuda
