// How the work of one product is shared: in equal runs, whatever the shape.
//
// A unit is one chunk of columns of one tile of the output. As long as there is a tile for every block, or nearly, each
// computes whole ones: at any time those that stand beside each other, which read the same weights or the same
// activations. The units of the tiles that are left stand in a row, and each block takes a run of them, so a run may
// end one tile and begin the next ("stream-K", Osama et al., arXiv 2301.03598). Of a tile that several blocks share,
// each leaves its sums in a slot of its own and draws a ticket; who draws the last one adds up all slots, in the order
// of the blocks. So nobody ever waits for another, results do not depend on who is last, and the tickets are back at
// zero.
#pragma once

#include "layout.h"

namespace llmquant::cuda {

constexpr int64_t MOST_UNITS = int64_t{1} << 30;
constexpr int MOST_PARTS = 8;  // of a tile, and blocks of a cluster

// The logarithm of 1, 2, 4 or 8.
LLMQUANT_BOTH constexpr int shift_of(int parts) { return (parts >> 1) - (parts >> 3); }

// So many clusters of 1, 2, 4 and 8 blocks run at the same time. It is less than multiprocessors allow: the blocks of
// one are in one GPC, and GPCs are of different sizes.
using Clusters = int[4];

struct Device {
    int processors;        // multiprocessors
    int capability;        // 80, 86, 89, 90, ..
    Clusters clusters[2];  // if one block fits a multiprocessor, and if two do; from sm_90 on
};

struct Schedule {
    int tiles, chunks;
    int blocks;  // each has something to do
    int whole;   // tiles that are not shared, the first ones
    int grain;   // of the others: units that are not parted, a divisor of chunks
    int share;   // grains of a block; one more for the first `extra` blocks
    int extra;
};

// For at most so many blocks at a time; of none, if there are more units than can be counted in 32 bits. `restart` is
// what it costs a block to end one tile and begin the next, in chunks.
constexpr Schedule schedule_of(int64_t tiles, int64_t chunks, int64_t blocks, int64_t restart) {
    if (tiles > MOST_UNITS || tiles * chunks > MOST_UNITS) return {};
    int64_t left = tiles % blocks, grain = 1;
    if (left * 8 >= blocks * 7) left = 0;  // the last blocks may as well have nothing to do for one tile's time
    const int64_t whole = tiles - left;
    // Runs that end where tiles do leave some blocks idle, but no block has to begin a second tile.
    int64_t parts = left ? blocks / left : 1;
    while (chunks % parts) --parts;
    if (chunks / parts <= left * chunks / blocks + restart) grain = chunks / parts;
    const int64_t grains = left * chunks / grain;
    if (!whole && grains < blocks) blocks = grains;
    if (!left && whole < blocks) blocks = whole;
    return {static_cast<int>(tiles),          static_cast<int>(chunks), static_cast<int>(blocks),
            static_cast<int>(whole),          static_cast<int>(grain),  static_cast<int>(grains / blocks),
            static_cast<int>(grains % blocks)};
}

// Of the shared tiles' units, where a block's run begins.
LLMQUANT_BOTH constexpr int first_unit(const Schedule& schedule, int block) {
    return schedule.grain * (block * schedule.share + (block < schedule.extra ? block : schedule.extra));
}

LLMQUANT_BOTH constexpr int block_of(const Schedule& schedule, int unit) {
    const int grain = unit / schedule.grain;
    const int larger = schedule.extra * (schedule.share + 1);  // grains of the first blocks
    return grain < larger ? grain / (schedule.share + 1) : schedule.extra + (grain - larger) / schedule.share;
}

// Units of the tiles that a block computes alone.
LLMQUANT_BOTH constexpr int units_alone(const Schedule& schedule, int block) {
    return (schedule.whole - block + schedule.blocks - 1) / schedule.blocks * schedule.chunks;
}

LLMQUANT_BOTH constexpr int units_of(const Schedule& schedule, int block) {
    return units_alone(schedule, block) + first_unit(schedule, block + 1) - first_unit(schedule, block);
}

// What a block does of one tile: chunks [begin, end).
struct Segment {
    int tile, begin, end;
};

// What it does after so many of its units.
LLMQUANT_BOTH constexpr Segment segment_at(const Schedule& schedule, int block, int done) {
    const int alone = units_alone(schedule, block);
    if (done < alone)
        return {done / schedule.chunks * schedule.blocks + block, done % schedule.chunks, schedule.chunks};
    const int unit = first_unit(schedule, block) + done - alone, tile = unit / schedule.chunks;
    const int begin = unit - tile * schedule.chunks, end = begin + units_of(schedule, block) - done;
    return {schedule.whole + tile, begin, end < schedule.chunks ? end : schedule.chunks};
}

LLMQUANT_BOTH constexpr bool is_whole(const Schedule& schedule, const Segment& segment) {
    return segment.begin == 0 && segment.end == schedule.chunks;
}

// The blocks that share a tile.
LLMQUANT_BOTH constexpr int first_block(const Schedule& schedule, int tile) {
    return block_of(schedule, (tile - schedule.whole) * schedule.chunks);
}
LLMQUANT_BOTH constexpr int last_block(const Schedule& schedule, int tile) {
    return block_of(schedule, (tile - schedule.whole + 1) * schedule.chunks - 1);
}

// Another way, for clusters: each tile belongs to 1, 2, 4 or 8 neighbouring blocks, which have equal parts of it; as
// many as leave each `least` chunks, and as run at the same time. (One that has to wait for room takes as long as all
// the others.)
constexpr Schedule cluster_schedule_of(int64_t tiles, int64_t chunks, const Clusters& at_once, int64_t least) {
    if (tiles > MOST_UNITS || tiles * chunks > MOST_UNITS) return {};
    int parts = 1;
    while (parts < MOST_PARTS && tiles <= at_once[shift_of(2 * parts)] && 2 * parts * least <= chunks) parts *= 2;
    const int64_t share = (chunks + parts - 1) / parts;
    return {static_cast<int>(tiles),
            static_cast<int>(chunks),
            static_cast<int>(tiles * parts),
            0,
            1,
            static_cast<int>(share),
            0};
}

// Chunks of the block that has the most.
constexpr int longest(const Schedule& schedule) { return units_of(schedule, 0); }

constexpr int cluster_of(const Schedule& schedule) { return schedule.blocks / schedule.tiles; }

LLMQUANT_BOTH constexpr Segment part_of(const Schedule& schedule, int tile, int part, int parts) {
    return {tile, schedule.chunks * part >> shift_of(parts), schedule.chunks * (part + 1) >> shift_of(parts)};
}

// A block shares at most two tiles: the one that its run begins within, and the one that it ends within.
constexpr int SLOTS = 2;
LLMQUANT_BOTH constexpr int slot_of(int block, bool begins_tile) { return SLOTS * block + (begins_tile ? 1 : 0); }

}  // namespace llmquant::cuda
