// The instructions of hopper.h on the emulated device of emulated.h. wgmma is done when it is asked for: that its
// registers are used too early is not seen.
#pragma once

#include <functional>
#include <utility>

#include "hopper.h"

#define LLMQUANT_WGMMA
#define LLMQUANT_CLUSTERS

namespace llmquant::cuda {

using Barrier = uint64_t;
using BoxMap = Boxes;

namespace emulated {

inline Phase& phase_of(Block& block, const void* barrier) {
    const auto found = block.barriers.find(barrier);
    if (found == block.barriers.end()) fail("an mbarrier that has not begun");
    return found->second;
}
inline Phase& phase_of(const Barrier* barrier) { return phase_of(own_block(), barrier); }

inline void expect_shared(const void* to, int64_t bytes, int64_t aligned) {
    const auto place = static_cast<const unsigned char*>(to) - own_memory();
    if (place < 0 || place + bytes > machine().shared_bytes) fail("a copy outside of shared memory");
    if (place % aligned) fail("a copy to where none can go");
}

// An arrival, and so many bytes are to come.
inline void expect_more(Phase& phase, int bytes) {
    phase.bytes += bytes;
    ++phase.arrived;
    phase.settle();
    machine().steps = 0;
}

// A copy that a barrier is told of: at once, or when somebody waits there.
inline void start_copy(Phase& phase, int64_t bytes, std::function<void()> copy) {
    const auto arrive = [copy = std::move(copy), bytes, &phase] {
        copy();
        phase.bytes -= bytes;
        phase.settle();
        machine().steps = 0;
    };
    if (machine().late)
        phase.copies.push_back(arrive);
    else
        arrive();
}

}  // namespace emulated

inline void begin_barrier(Barrier* barrier, int arrivals) {
    emulated::own_block().barriers[barrier] = emulated::Phase{arrivals, 0, 0, 0, {}};
}
inline void fence_barriers() {}
inline void expect_bytes(Barrier* barrier, int bytes) { emulated::expect_more(emulated::phase_of(barrier), bytes); }
inline void arrive(Barrier* barrier) { expect_bytes(barrier, 0); }
inline void await_phase(Barrier* barrier, int parity) {
    emulated::Phase& phase = emulated::phase_of(barrier);
    while (phase.parity == parity) {
        for (const auto& copy : std::exchange(phase.copies, {})) copy();
        if (phase.parity == parity) emulated::yield();
    }
}

inline int rank_in_cluster() { return emulated::machine().member; }
inline int blocks_of_cluster() { return static_cast<int>(emulated::machine().cluster.size()); }
inline int cluster_index() { return block_index() / blocks_of_cluster(); }
inline void arrive_in_cluster() {
    emulated::Machine& m = emulated::machine();
    emulated::own_thread().awaited = m.all.round + 1;
    if (++m.all.arrived < threads_of_block() * static_cast<int>(m.cluster.size())) return;
    m.all.arrived = 0;
    ++m.all.round;
    m.steps = 0;
}
inline void await_cluster() {
    while (emulated::machine().all.round < emulated::own_thread().awaited) emulated::yield();
}

namespace emulated {

inline Block& block_of(int rank) {
    if (!machine().in_clusters) fail("a launch without clusters");  // an illegal instruction, on an H100
    if (rank < 0 || rank >= static_cast<int>(machine().cluster.size())) fail("a block outside of the cluster");
    Block& block = machine().cluster[static_cast<std::size_t>(rank)];
    if (!block.begun || block.ended()) fail("a block of the cluster that is not there");
    return block;
}

// The same place in another block's memory.
inline unsigned char* place_in(const Block& block, const void* here) {
    return block.memory->bytes + (static_cast<const unsigned char*>(here) - own_memory());
}

}  // namespace emulated

inline void arrive_at(Barrier* barrier, int rank) {
    emulated::Block& block = emulated::block_of(rank);
    emulated::expect_more(emulated::phase_of(block, emulated::place_in(block, barrier)), 0);
}
template <class Value>
void send(Value* to, int rank, const std::common_type_t<Value>& value, Barrier* barrier) {
    constexpr int BYTES = sizeof(Value);
    emulated::expect_shared(to, BYTES, BYTES);
    emulated::Block& block = emulated::block_of(rank);
    emulated::start_copy(emulated::phase_of(block, emulated::place_in(block, barrier)), BYTES,
                         [to = emulated::place_in(block, to), value] { std::memcpy(to, &value, BYTES); });
}

inline void await_sent(Barrier* barrier) { await_phase(barrier, 0); }

inline void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier, uint64_t) {
    emulated::expect_shared(to, bytes, 16);
    emulated::expect_aligned(from);
    if (bytes <= 0 || bytes % 16) emulated::fail("a copy of no possible size");
    emulated::start_copy(emulated::phase_of(barrier), bytes,
                         [=] { std::memcpy(to, from, static_cast<std::size_t>(bytes)); });
}

namespace emulated {

inline void start_box(Block& block, void* to, const BoxMap& map, int column, int token, Barrier* barrier) {
    const int row = 2 * map.box_columns;  // bytes
    expect_shared(to, int64_t{row} * map.box_tokens, 1024);
    if (row != 128) fail("a box of another width than its swizzle has");
    start_copy(phase_of(block, place_in(block, barrier)), int64_t{row} * map.box_tokens, [=, to = place_in(block, to)] {
        for (int t = 0; t < map.box_tokens; ++t)
            for (int c = 0; c < map.box_columns; ++c) {
                const bool there = token + t < map.tokens && column + c < map.columns;
                const uint16_t number = there ? map.numbers[(token + t) * map.stride + column + c] : 0;
                std::memcpy(to + t * row + ((c / 8 ^ t % 8) * 16 + c % 8 * 2), &number, 2);
            }
    });
}

}  // namespace emulated

inline void copy_box(void* to, const BoxMap& map, int column, int token, Barrier* barrier) {
    emulated::start_box(emulated::own_block(), to, map, column, token, barrier);
}
inline void copy_box_to_both(void* to, const BoxMap& map, int column, int token, Barrier* barrier) {
    if (emulated::machine().cluster.size() != 2) emulated::fail("a cluster that is not of two blocks");
    for (int rank = 0; rank < 2; ++rank) emulated::start_box(emulated::block_of(rank), to, map, column, token, barrier);
}

// Late where copies to shared memory are early: so a place that is free too soon is found.
inline void leave_box(const void* from, const BoxMap& map, int column, int token) {
    emulated::expect_shared(from, int64_t{2} * map.box_columns * map.box_tokens, 1024);
    if (map.box_columns != 64) emulated::fail("a box of another width than its swizzle has");
    const auto own = emulated::own_block().threads.begin() + emulated::machine().running / WARPGROUP * WARPGROUP;
    if (std::any_of(own, own + WARPGROUP, [](const emulated::Thread& thread) { return thread.unseen; }))
        emulated::fail("a copy of what the copy engine does not see yet");
    const auto leave = [=, from = static_cast<const unsigned char*>(from)] {
        for (int t = 0; t < map.box_tokens && token + t < map.tokens; ++t)
            for (int c = 0; c < 64 && column + c < map.columns; ++c)
                std::memcpy(const_cast<uint16_t*>(map.numbers) + (token + t) * map.stride + column + c,
                            from + t * 128 + ((c / 8 ^ t % 8) * 16 + c % 8 * 2), 2);
    };
    if (emulated::machine().late)
        leave();
    else
        emulated::own_thread().leaving.push_back(leave);
}
inline void await_left() {
    for (const auto& leave : std::exchange(emulated::own_thread().leaving, {})) leave();
}
inline void show_copies() { emulated::own_thread().unseen = false; }

inline void store_transposed(const uint32_t (&pairs)[4], void* row) {
    struct Operands {
        const uint32_t* pairs;
        unsigned char* row;
    } own = {pairs, static_cast<unsigned char*>(row)};
    emulated::expect_aligned(row);
    emulated::own_thread().unseen = true;
    emulated::meet_warp(own, [](Operands** all) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            emulated::count_conflicts([&](int i) { return all[8 * matrix + i]->row; });
            for (int lane = 0; lane < LANES; ++lane)
                for (int i = 0; i < 2; ++i) {
                    const uint32_t pair = all[lane]->pairs[matrix];
                    const auto number = static_cast<uint16_t>(pair >> 16 * i);
                    std::memcpy(all[8 * matrix + lane % 4 * 2 + i]->row + 2 * (lane / 4), &number, 2);
                }
        }
    });
}

inline void sync_warpgroup(int group) {
    emulated::meet(emulated::own_block().warpgroups[group], WARPGROUP, [] {});
}

inline void prefetch_map(const BoxMap&) {}

inline int64_t map_boxes(const Boxes& boxes, BoxMap* map) {
    *map = boxes;
    return 0;
}

// PTX ISA, "Matrix descriptor": units of 16 bytes; the swizzle of 128 bytes exchanges bits 4..6 of an address with
// themselves and bits 7..9.
inline uint64_t matrix_of(const void* boxes) {
    const auto place = static_cast<const unsigned char*>(boxes) - emulated::own_memory();
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | static_cast<uint64_t>(place) >> 4;
}
inline uint64_t matrix_at(uint64_t matrix, int bytes) { return matrix + static_cast<uint64_t>(bytes >> 4); }

inline void begin_group() {}
inline void commit_group() {}
template <int PENDING>
void await_groups() {}
template <int ROWS, int COUNT>
void await_sums(float (&)[ROWS][COUNT]) {}

// PTX ISA, "Register fragments for wgmma.m64nNk16": a warp's 16 rows of A and of D.
template <class T, int TOKENS>
void multiply_add_group(float (&c)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b) {
    struct Operands {
        float* c;
        const uint32_t* a;
        uint64_t b;
    } own = {c, a, b};
    emulated::meet_warp(own, [](Operands** all) {
        double A[16][16], B[16][TOKENS];
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < 8; ++i)
                A[(lane >> 2) + 8 * (i >> 1 & 1)][lane % 4 * 2 + (i & 1) + 8 * (i >> 2)] =
                    emulated::decoded(all[lane]->a[i / 2] >> 16 * (i % 2) & 0xffff, T());
        const uint64_t matrix = all[0]->b, eight_rows = (matrix >> 32 & 0x3fff) << 4;
        for (int n = 0; n < TOKENS; ++n)
            for (int k = 0; k < 16; ++k) {
                uint64_t at = ((matrix & 0x3fff) << 4) + n / 8 * eight_rows + n % 8 * 128 + 2 * k;
                at ^= (at >> 7 & 7) << 4;
                uint16_t number;
                std::memcpy(&number, emulated::own_memory() + at, 2);
                B[k][n] = emulated::decoded(number, T());
            }
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < TOKENS / 2; ++i) {
                const int row = (lane >> 2) + 8 * (i >> 1 & 1), column = 8 * (i >> 2) + lane % 4 * 2 + (i & 1);
                double sum = all[lane]->c[i];
                for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
                all[lane]->c[i] = static_cast<float>(sum);
            }
    });
}

template <int COUNT>
void take_registers() {}
template <int COUNT>
void leave_registers() {}

}  // namespace llmquant::cuda
