// How the blocks of wgmma.h work together: what each does, and how the sums of a tile that several share are added up
// and written.
//
// A block alone does what the schedule says, and shares tiles by way of memory. Blocks may also be a team, which is a
// cluster. Of a pair the tiles are below one another: each asks for half of the activations, for both, so these are
// read half as often from L2, which for many tokens is most of what is read from there. In a split each has some of the
// columns of one tile; in the end they send each other their sums, and each writes a part of the tile.
#pragma once

#include "finish.h"
#include "warpgroups.h"

namespace llmquant::cuda::warpgroups {

enum class Team { NONE, PAIR, SPLIT };

// A block, or a pair of them, as the schedule counts, and which of the pair this one is.
template <Team TEAM>
__device__ __forceinline__ int worker() {
    return TEAM == Team::PAIR ? cluster_index() : block_index();
}
template <Team TEAM>
__device__ __forceinline__ int side() {
    return TEAM == Team::PAIR ? rank_in_cluster() : 0;
}
template <Team TEAM>
constexpr int SIDES = TEAM == Team::PAIR ? 2 : 1;

// What this block does, after so many of its units: what the schedule says, or its part of the split's tile.
template <Team TEAM>
__device__ __forceinline__ Segment own_segment(const Schedule& schedule, int done) {
    if constexpr (TEAM == Team::SPLIT) {
        const Segment part = part_of(schedule, cluster_index(), rank_in_cluster(), blocks_of_cluster());
        return {part.tile, part.begin + done, part.end};
    }
    return segment_at(schedule, worker<TEAM>(), done);
}
template <Team TEAM>
__device__ __forceinline__ int own_units(const Schedule& schedule) {
    if constexpr (TEAM == Team::SPLIT) {
        const Segment part = own_segment<TEAM>(schedule, 0);
        return part.end - part.begin;
    }
    return units_of(schedule, worker<TEAM>());
}

// Sums of a thread, four together: of two rows and two tokens.
template <int TOKENS>
constexpr int FOURS = OWN<TOKENS> * TOKENS / 8;

// Leaves this block's sums in the workspace; the last block of the tile finds in `sums` those of all, and true.
template <int TOKENS, Team TEAM>
__device__ __forceinline__ bool add_blocks(const Product& product, const Segment& segment, Shared<TOKENS>& shared,
                                           Sums<TOKENS>& sums) {
    const Schedule& schedule = product.schedule;
    const auto slot = [&](int block, bool begins_tile) {
        const int place = slot_of(block, begins_tile) * SIDES<TEAM> + side<TEAM>();
        return product.partials + (place * FOURS<TOKENS> * CONSUMERS + thread_index());
    };
    Floats* own = slot(worker<TEAM>(), segment.begin == 0);
#pragma unroll
    for (int i = 0; i < FOURS<TOKENS>; ++i) {
        const float* four = &sums[i / (TOKENS / 8)][i % (TOKENS / 8) * 4];
        own[i * CONSUMERS] = {{four[0], four[1], four[2], four[3]}};
    }
    const auto sync = [] { sync_threads<CONSUMERS>(); };
    if (!is_last(product, segment.tile, segment.tile * SIDES<TEAM> + side<TEAM>(), &shared.word, sync)) return false;
    const int first = first_block(schedule, segment.tile), last = last_block(schedule, segment.tile);
#pragma unroll
    for (int i = 0; i < OWN<TOKENS> * TOKENS / 2; ++i) sums[i / (TOKENS / 2)][i % (TOKENS / 2)] = 0;
    [[maybe_unused]] constexpr int BLOCKS_AT_ONCE = FOURS<TOKENS> <= 4 ? 4 : 1;  // so that many loads are on their way
#pragma unroll BLOCKS_AT_ONCE
    for (int block = first; block <= last; ++block) {
        const Floats* other = slot(block, block == first);
#pragma unroll
        for (int i = 0; i < FOURS<TOKENS>; ++i) {
            const Floats more = load_fresh(other + i * CONSUMERS);
            float* four = &sums[i / (TOKENS / 8)][i % (TOKENS / 8) * 4];
#pragma unroll
            for (int r = 0; r < 4; ++r) four[r] += more.value[r];
        }
    }
    return true;
}

// `COUNT` eights of tokens, from the first token on. Of each this thread has two sums of row b, which is one of two;
// transposed, it has two rows of one token, which are beside each other in y.
template <class T, int COUNT, int TOKENS, class Two>
__device__ __forceinline__ void write_eights(const Product& product, const Part<TOKENS>& part, int first_row, int j,
                                             int first_token, Two two) {
    const int rows = product.weight.layout.rows, token = first_token + part.lane / 4;
    const int left = product.tokens - token;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const int of_sums = first_row + part.row(j, 2 * b), first = of_sums - part.lane / 4;
        const int row = first + part.lane % 4 * 2;
        const float bias = of_sums < rows ? bias_at(product, of_sums) : 0;
        uint16_t* y = product.y + int64_t{token} * rows + row;
        const auto each = [&](auto store) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const uint32_t pair = transpose_matrix(to_pair<T>(two(i, b)[0] + bias, two(i, b)[1] + bias));
                if (8 * i < left) store(pair);
                y += int64_t{8} * rows;
            }
        };
        if (uniform(rows % 2 == 0 && first + 8 <= rows)) {  // the eight rows of the warp's lanes are there
            each([&](uint32_t pair) { *reinterpret_cast<uint32_t*>(y) = pair; });
        } else {
            each([&](uint32_t pair) {
                if (row < rows) y[0] = static_cast<uint16_t>(pair);
                if (row + 1 < rows) y[1] = static_cast<uint16_t>(pair >> 16);
            });
        }
    }
}

template <class T, int TOKENS>
__device__ __forceinline__ void write(const Product& product, int row_tile, int token_tile, const Sums<TOKENS>& sums) {
    const Part<TOKENS> part;
#pragma unroll
    for (int j = 0; j < OWN<TOKENS>; ++j)
        write_eights<T, TOKENS / 8>(product, part, row_tile * TILES<TOKENS> * TILE, j, token_tile * TOKENS,
                                    [&](int i, int b) { return &sums[j][4 * i + 2 * b]; });
}

// The same by way of shared memory, where a stage's x was, which nobody needs any more when all of the block are here:
// each warpgroup puts its 64 rows of all tokens together there, and the copy engine takes them away. The thread that
// has asked for that awaits it.
template <class T, int TOKENS>
__device__ __forceinline__ void leave(const Product& product, const BoxMap& y, int row_tile, int token_tile,
                                      Stage<TOKENS>& stage, const Sums<TOKENS>& sums) {
    static_assert(GROUPS == TILES<TOKENS> && GROUPS == BOXES && TILE == BOX,
                  "a warpgroup has a box, and there is room");
    sync_threads<CONSUMERS>();
    const Part<TOKENS> part;
    const int tile_row = (row_tile * TILES<TOKENS> + part.tile) * TILE, rows = product.weight.layout.rows;
    float bias[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const int row = row_tile * TILES<TOKENS> * TILE + part.row(0, 2 * b);
        bias[b] = row < rows ? bias_at(product, row) : 0;
    }
    // Of 16 tokens four matrices, and which of their rows this lane names.
    const int token = part.lane / 16 * 8 + part.lane % 8, granule = 2 * part.word + part.lane / 8 % 2;
    Words* to = stage.x[part.group] + activations_at(BOX / GRANULE, token, granule);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i += 2) {
        uint32_t pairs[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const float* two = &sums[0][4 * (i + m / 2) + 2 * (m % 2)];
            pairs[m] = to_pair<T>(two[0] + bias[m % 2], two[1] + bias[m % 2]);
        }
        store_transposed(pairs, to + 8 * i * (BOX / GRANULE));
    }
    show_copies();
    sync_warpgroup(part.group);
    if (part.thread % WARPGROUP == 0 && tile_row < rows)
        leave_box(stage.x[part.group], y, tile_row, token_tile * TOKENS);
}

// Until all threads of the cluster are here.
__device__ __forceinline__ void meet_cluster() {
    sync_warp();
    arrive_in_cluster();
    await_cluster();
}

// The end of a split. Fours of a tile stand in a row, [fours of a thread][threads]; each block answers for an equal
// part of them, and is sent what the others have summed of it to where its stages were.
template <class T, int TOKENS>
__device__ __forceinline__ void finish_split(const Product& product, int token_tiles, Shared<TOKENS>& shared,
                                             const Sums<TOKENS>& sums, float worth) {
    constexpr int COUNT = FOURS<TOKENS> * CONSUMERS, EIGHTS = TOKENS / 8;
    static_assert(COUNT * sizeof(Floats) <= sizeof(shared.stages), "there is room");
    Floats* sent = reinterpret_cast<Floats*>(&shared.stages);                                           // [blocks][own]
    const int blocks = blocks_of_cluster(), rank = rank_in_cluster(), own = COUNT >> shift_of(blocks);  // whole warps
    meet_cluster();  // nobody needs the stages any more
#pragma unroll
    for (int i = 0; i < FOURS<TOKENS>; ++i) {
        const float* four = &sums[i / EIGHTS][i % EIGHTS * 4];
        const int at = i * CONSUMERS + thread_index(), to = at * blocks / COUNT;
        send(sent + rank * own + at - to * own, to, Floats{{four[0], four[1], four[2], four[3]}}, &shared.sent);
    }
    await_sent(&shared.sent);
    const int row_tile = cluster_index() / token_tiles, token_tile = cluster_index() % token_tiles;
#pragma unroll 1
    for (int i = thread_index(); i < own; i += CONSUMERS) {
        Floats sum = {};
#pragma unroll 1
        for (int block = 0; block < blocks; ++block)
#pragma unroll
            for (int r = 0; r < 4; ++r) sum.value[r] += sent[block * own + i].value[r];
#pragma unroll
        for (int r = 0; r < 4; ++r) sum.value[r] *= worth;
        const int at = rank * own + i, four = at / CONSUMERS;
        const Part<TOKENS> part = {at % CONSUMERS};  // who has summed it
        write_eights<T, 1>(product, part, row_tile * TILES<TOKENS> * TILE, four / EIGHTS,
                           token_tile * TOKENS + four % EIGHTS * 8, [&](int, int b) { return &sum.value[2 * b]; });
    }
}

}  // namespace llmquant::cuda::warpgroups
