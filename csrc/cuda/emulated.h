// The device of device.h on the CPU, so that the kernels themselves, and not copies of them, run in tests without a
// GPU.
//
// Threads of a block are fibers that run one at a time, each until it meets others: at a barrier, a shuffle, ldmatrix
// or mma. Blocks follow each other, but for those of a cluster, which run together. What the hardware leaves open is
// chosen badly on purpose, by `llmquant_emulate`: the order of threads and blocks, and whether an asynchronous copy
// arrives at once or not before it is waited for. Shared memory starts out as NaNs. Fragments are placed as the PTX ISA
// documents them, not as layout.h does.
//
// What this cannot show: anything about time, races within what one thread does between two meetings, and registers
// that are used while wgmma still reads or writes them.
#pragma once

#include <cmath>
#include <cstring>

#include "device.h"
#include "emulated_machine.h"
#include "emulated_numbers.h"
#include "llmquant_cuda.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace llmquant::cuda {

inline int thread_index() { return emulated::machine().running; }
inline int block_index() { return emulated::own_block().index; }
inline int threads_of_block() { return static_cast<int>(emulated::own_block().threads.size()); }
inline unsigned char* shared_memory() { return emulated::own_memory(); }

inline void sync_block() {
    emulated::meet(emulated::own_block().everyone, threads_of_block(), [] {});
}
inline void sync_warp() {
    int none = 0;
    emulated::meet_warp(none, [](int**) {});
}
template <int THREADS>
void sync_threads() {
    emulated::meet(emulated::own_block().some, THREADS, [] {});
}

inline void fence() {}

inline float shuffle(float value, int lane, int width) {
    struct Operands {
        float given, taken;
        int lane, width;
    } own = {value, 0, lane, width};
    emulated::meet_warp(own, [](Operands** all) {
        for (int i = 0; i < LANES; ++i)
            all[i]->taken = all[i / all[i]->width * all[i]->width + all[i]->lane % all[i]->width]->given;
    });
    return own.taken;
}

inline int uniform(int value) {
    emulated::meet_warp(value, [](int** all) {
        for (int lane = 1; lane < LANES; ++lane)
            if (*all[lane] != *all[0]) emulated::fail("lanes that do not agree");
    });
    return value;
}
inline float shuffle_xor(float value, int mask) {
    return shuffle(value, emulated::machine().running % LANES ^ mask, LANES);
}

inline uint64_t evict_first() { return 0; }
inline uint64_t evict_normal() { return 0; }

inline void load_once(Words& words, const Words* from, bool wanted, uint64_t) {
    if (!wanted) return;
    emulated::expect_aligned(from);
    words = *from;
}
inline float load_fresh(const float* from) { return *from; }
inline Floats load_fresh(const Floats* from) {
    emulated::expect_aligned(from);
    return *from;
}

inline void copy_async(void* to, const void* from, int bytes) {
    emulated::Machine& m = emulated::machine();
    emulated::expect_aligned(to);
    emulated::expect_aligned(from);
    if (bytes < 0 || bytes > 16) emulated::fail("a copy of no possible size");
    const auto place = static_cast<unsigned char*>(to) - shared_memory();
    if (place < 0 || place + 16 > m.shared_bytes) emulated::fail("a copy outside of shared memory");
    const auto copy = [](const emulated::Copy& c) {
        std::memset(c.to, 0, 16);
        std::memcpy(c.to, c.from, static_cast<std::size_t>(c.bytes));
    };
    if (m.late)
        emulated::own_thread().groups.back().push_back({to, from, bytes});
    else
        copy({to, from, bytes});
}
inline void copy_async_once(void* to, const void* from, uint64_t) { copy_async(to, from, 16); }
inline void commit_copies() { emulated::own_thread().groups.emplace_back(); }
template <int PENDING>
void await_copies() {
    auto& groups = emulated::own_thread().groups;
    while (groups.size() > PENDING + 1) {  // the last one is not yet committed
        for (const emulated::Copy& c : groups.front()) {
            std::memset(c.to, 0, 16);
            std::memcpy(c.to, c.from, static_cast<std::size_t>(c.bytes));
        }
        groups.erase(groups.begin());
    }
}

inline void load_matrices(uint32_t (&b)[4], const void* row) {
    struct Operands {
        uint32_t* b;
        const unsigned char* row;
    } own = {b, static_cast<const unsigned char*>(row)};
    emulated::expect_aligned(row);
    emulated::meet_warp(own, [](Operands** all) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            emulated::count_conflicts([&](int i) { return all[8 * matrix + i]->row; });
            for (int lane = 0; lane < LANES; ++lane)
                std::memcpy(&all[lane]->b[matrix], all[8 * matrix + lane / 4]->row + 4 * (lane % 4), 4);
        }
    });
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } own = {c, a, {b0, b1}};
    emulated::meet_warp(own, [](Operands** all) {
        double A[16][16], B[16][8];
        for (int lane = 0; lane < LANES; ++lane) {
            const int group = lane >> 2, member = lane % 4;
            for (int i = 0; i < 8; ++i) {
                const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                const int column = member * 2 + (i & 1) + (i < 4 ? 0 : 8);
                A[row][column] = emulated::decoded(all[lane]->a[i / 2] >> 16 * (i % 2) & 0xffff, T());
            }
            for (int i = 0; i < 4; ++i)
                B[member * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] =
                    emulated::decoded(all[lane]->b[i / 2] >> 16 * (i % 2) & 0xffff, T());
        }
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
                double sum = all[lane]->c[i];
                for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
                all[lane]->c[i] = static_cast<float>(sum);
            }
    });
}

inline uint32_t transpose_matrix(uint32_t pair) {
    struct Operands {
        uint32_t given, taken;
    } own = {pair, 0};
    emulated::meet_warp(own, [](Operands** all) {
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < 2; ++i) {
                const int row = lane % 4 * 2 + i, column = lane / 4;  // of what is given
                const uint32_t number = all[row * 4 + column / 2]->given >> 16 * (column % 2) & 0xffff;
                all[lane]->taken |= number << 16 * i;
            }
    });
    return own.taken;
}

inline uint32_t pick_bytes(uint32_t word, uint32_t selector) {
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) picked |= (word >> 8 * (selector >> 4 * i & 3) & 0xff) << 8 * i;
    return picked;
}

inline uint32_t merge(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int half = 0; half < 32; half += 16) {
        const auto number = [&](uint32_t pair) { return emulated::decoded(pair >> half & 0xffff, T()); };
        d |= emulated::encoded(number(a) * number(b) + number(c), T()) << half;
    }
    return d;
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
template <class T>
float to_float(uint32_t bits) {
    return static_cast<float>(emulated::decoded(bits & 0xffff, T()));
}
template <class T>
uint32_t to_pair(float low, float high) {
    return emulated::encoded(low, T()) | emulated::encoded(high, T()) << 16;
}

inline bool draw_ticket(uint32_t* tickets, uint32_t last) {
    const uint32_t drawn = *tickets;
    *tickets = drawn >= last ? 0 : drawn + 1;
    return drawn == last;
}

inline void let_next_begin() {}
inline void await_previous() {}

template <class Task>
int64_t launch(void (*kernel)(Task), const Launch& launch, const Task& task) {
    emulated::Machine& m = emulated::machine();
    m.failure.clear();
    m.steps = 0;
    m.shared_bytes = launch.shared_bytes;
    if (launch.shared_bytes > (m.device.capability == 90 ? emulated::MOST_SHARED : emulated::OTHERS_SHARED))
        m.failure = "more shared memory than a block has";
    std::mt19937 random(m.seed);
    const int cluster = max(launch.cluster, 1);
    m.in_clusters = launch.cluster != 0;
    if (cluster > MOST_PARTS || launch.blocks % cluster) m.failure = "no whole clusters";
    std::vector<int> order(static_cast<std::size_t>(launch.blocks / cluster));
    std::iota(order.begin(), order.end(), 0);
    if (m.seed) std::shuffle(order.begin(), order.end(), random);
    for (std::size_t i = 0; i < order.size() && m.failure.empty(); ++i)
        emulated::run_cluster(launch, cluster, order[i] * cluster, [&] { kernel(task); }, random);
    return m.failure.empty() ? 0 : 1;
}

inline const char* device_message(int64_t) { return emulated::machine().failure.c_str(); }

}  // namespace llmquant::cuda

// So many multiprocessors, so many of them in a GPC (what is left over is one, too), of so a capability; with a seed,
// threads and blocks take their turns in an order drawn from it; `late`: asynchronous copies arrive when they are
// waited for, and not at once.
LLMQUANT_CUDA_EXPORT void llmquant_emulate(int64_t processors, int64_t in_gpc, int64_t capability, int64_t seed,
                                           int64_t late);
// The most rows of one 8 x 8 matrix that ldmatrix has found in the same banks since the last call; 1 is no conflict.
LLMQUANT_CUDA_EXPORT int64_t llmquant_emulated_conflicts();
// Walks through a schedule as kernels do, and counts in `done` how often each of the tiles * chunks units is met. 0, or
// what is wrong: 1 units do not follow each other, 2 a tile belongs to other blocks, 3 sums are looked for in another
// slot, 4 a slot is written twice, 5 there are too many blocks, or one with nothing to do.
LLMQUANT_CUDA_EXPORT int64_t llmquant_emulated_schedule(int64_t tiles, int64_t chunks, int64_t blocks, int32_t* done);
