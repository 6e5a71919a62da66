// The device of device.h on the CPU, so that the kernels themselves, and not copies of them, run in tests without a
// GPU.
//
// Threads of a block are fibers that run one at a time, each until it meets others: at a barrier, a shuffle, ldmatrix
// or mma. Blocks follow each other. What the hardware leaves open is chosen badly on purpose, by `llmquant_emulate`:
// the order of threads and blocks, and whether an asynchronous copy arrives at once or not before it is waited for.
// Shared memory starts out as NaNs. Fragments are placed as the PTX ISA documents them, not as layout.h does.
//
// What this cannot show: anything about time, races within what one thread does between two meetings, and registers
// that are used while wgmma still reads or writes them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "emulated_numbers.h"
#include "llmquant_cuda.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define LLMQUANT_WGMMA

namespace llmquant::cuda {

using std::max;
using std::min;

using Barrier = uint64_t;
using BoxMap = Boxes;

struct Device {
    int processors, capability;
};

struct Launch {
    int64_t blocks;
    int threads;
    int shared_bytes;
    bool overlap;
    void* stream;
};

namespace emulated {

constexpr int64_t STACK = 128 * 1024;
constexpr int MOST_SHARED = 227 * 1024;   // of a block, on sm_90
constexpr int OTHERS_SHARED = 99 * 1024;  // on the smallest device that is served (sm_86)

// Copies of one thread that are on their way, in groups.
struct Copy {
    void* to;
    const void* from;
    int bytes;
};

// What the copy engine has yet to write, and the mbarriers that it does so for.
struct Phase {
    int arrivals, arrived = 0, parity = 0;
    int64_t bytes = 0;  // yet to come
    std::vector<std::function<void()>> copies;

    // Every arrival and every byte is there.
    void settle() {
        if (arrived < arrivals || bytes != 0) return;
        arrived = 0;
        parity ^= 1;
    }
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool ended = false;
    std::vector<std::vector<Copy>> groups;
};

// Where threads wait for each other.
struct Meeting {
    int arrived = 0;
    int64_t round = 0;
    void* operands[LANES] = {};
};

struct Machine {
    Device device = {2, 90};
    uint32_t seed = 0;
    bool late = false;  // copies arrive when they are waited for

    std::vector<Thread> threads;
    std::vector<Meeting> warps;
    Meeting everyone, some;
    std::map<const Barrier*, Phase> barriers;
    ucontext_t scheduler;
    int running = 0, block = 0;
    alignas(1024) unsigned char shared[MOST_SHARED];
    int shared_bytes = 0;
    int worst_conflict = 0;  // of ldmatrix: rows of one matrix in the same banks; 1 is none
    std::string failure;
    int64_t steps = 0;  // of the scheduler: when nothing moves on any more, threads wait for each other forever
};

inline Machine& machine() {
    static Machine one;
    return one;
}

inline void yield() {
    Machine& m = machine();
    swapcontext(&m.threads[static_cast<std::size_t>(m.running)].context, &m.scheduler);
}

inline void fail(const char* what) {
    if (machine().failure.empty()) machine().failure = what;
    for (;;) yield();
}

inline void expect_aligned(const void* pointer) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16) fail("an access of 16 bytes is not aligned");
}

// Waits until `members` threads are here; the last one does `work` for all.
template <class Work>
void meet(Meeting& meeting, int members, Work work) {
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        work();
        ++meeting.round;
        machine().steps = 0;
        return;
    }
    for (const int64_t round = meeting.round; meeting.round == round;) yield();
}

template <class Operands, class Work>
void meet_warp(Operands& own, Work work) {
    Machine& m = machine();
    Meeting& warp = m.warps[static_cast<std::size_t>(m.running / LANES)];
    warp.operands[m.running % LANES] = &own;
    meet(warp, LANES, [&] { work(reinterpret_cast<Operands**>(warp.operands)); });
}

// Runs `body` in every thread of one block.
template <class Body>
void run_block(const Launch& launch, const Body& body, std::mt19937& random) {
    Machine& m = machine();
    const auto count = static_cast<std::size_t>(launch.threads);
    std::memset(m.shared, 0xff, sizeof m.shared);
    m.warps.assign(count / LANES, Meeting());
    m.everyone = m.some = Meeting();
    m.barriers.clear();
    if (m.threads.size() < count) m.threads.resize(count);

    static const Body* current;
    current = &body;
    for (std::size_t i = 0; i < count; ++i) {
        Thread& thread = m.threads[i];
        if (!thread.stack) thread.stack.reset(new char[STACK]);
        thread.ended = false;
        thread.groups.assign(1, {});
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(
            &thread.context,
            +[] {
                (*current)();
                machine().threads[static_cast<std::size_t>(machine().running)].ended = true;
                yield();
            },
            0);
    }
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (m.seed) std::shuffle(order.begin(), order.end(), random);
    for (bool going = true; going && m.failure.empty();) {
        going = false;
        for (const int index : order) {
            Thread& thread = m.threads[static_cast<std::size_t>(index)];
            if (thread.ended || !m.failure.empty()) continue;
            going = true;
            m.running = index;
            swapcontext(&m.scheduler, &thread.context);
            if (thread.ended) m.steps = 0;
        }
        if (++m.steps > 4) m.failure = "threads wait for others that never come";
    }
}

}  // namespace emulated

inline int thread_index() { return emulated::machine().running; }
inline int block_index() { return emulated::machine().block; }
inline int threads_of_block() { return static_cast<int>(emulated::machine().warps.size()) * LANES; }
inline unsigned char* shared_memory() { return emulated::machine().shared; }

inline void sync_block() {
    emulated::meet(emulated::machine().everyone, threads_of_block(), [] {});
}
inline void sync_warp() {
    int none = 0;
    emulated::meet_warp(none, [](int**) {});
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
    const auto place = static_cast<unsigned char*>(to) - m.shared;
    if (place < 0 || place + 16 > m.shared_bytes) emulated::fail("a copy outside of shared memory");
    const auto copy = [](const emulated::Copy& c) {
        std::memset(c.to, 0, 16);
        std::memcpy(c.to, c.from, static_cast<std::size_t>(c.bytes));
    };
    if (m.late)
        m.threads[static_cast<std::size_t>(m.running)].groups.back().push_back({to, from, bytes});
    else
        copy({to, from, bytes});
}
inline void copy_async_once(void* to, const void* from, uint64_t) { copy_async(to, from, 16); }
inline void commit_copies() {
    auto& groups = emulated::machine().threads[static_cast<std::size_t>(emulated::machine().running)].groups;
    groups.emplace_back();
}
template <int PENDING>
void await_copies() {
    auto& groups = emulated::machine().threads[static_cast<std::size_t>(emulated::machine().running)].groups;
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
            int rows_in[8] = {};  // each 16 bytes wide group of banks
            for (int i = 0; i < 8; ++i) ++rows_in[(all[8 * matrix + i]->row - emulated::machine().shared) / 16 % 8];
            emulated::Machine& m = emulated::machine();
            m.worst_conflict = std::max(m.worst_conflict, *std::max_element(rows_in, rows_in + 8));
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

namespace emulated {

inline Phase& phase_of(const Barrier* barrier) {
    const auto found = machine().barriers.find(barrier);
    if (found == machine().barriers.end()) fail("an mbarrier that has not begun");
    return found->second;
}

inline void expect_shared(const void* to, int64_t bytes, int64_t aligned) {
    const auto place = static_cast<const unsigned char*>(to) - machine().shared;
    if (place < 0 || place + bytes > machine().shared_bytes) fail("a copy outside of shared memory");
    if (place % aligned) fail("a copy to where none can go");
}

// A copy that `barrier` is told of: at once, or when somebody waits there.
inline void start_copy(Barrier* barrier, int64_t bytes, std::function<void()> copy) {
    Phase& phase = phase_of(barrier);
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
    emulated::machine().barriers[barrier] = emulated::Phase{arrivals, 0, 0, 0, {}};
}
inline void fence_barriers() {}
inline void expect_bytes(Barrier* barrier, int bytes) {
    emulated::Phase& phase = emulated::phase_of(barrier);
    phase.bytes += bytes;
    ++phase.arrived;
    phase.settle();
    emulated::machine().steps = 0;
}
inline void arrive(Barrier* barrier) { expect_bytes(barrier, 0); }
inline void await_phase(Barrier* barrier, int parity) {
    emulated::Phase& phase = emulated::phase_of(barrier);
    while (phase.parity == parity) {
        for (const auto& copy : std::exchange(phase.copies, {})) copy();
        if (phase.parity == parity) emulated::yield();
    }
}

inline void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier, uint64_t) {
    emulated::expect_shared(to, bytes, 16);
    emulated::expect_aligned(from);
    if (bytes <= 0 || bytes % 16) emulated::fail("a copy of no possible size");
    emulated::start_copy(barrier, bytes, [=] { std::memcpy(to, from, static_cast<std::size_t>(bytes)); });
}

inline void copy_box(void* to, const BoxMap& map, int column, int token, Barrier* barrier) {
    const int row = 2 * map.box_columns;  // bytes
    emulated::expect_shared(to, int64_t{row} * map.box_tokens, 1024);
    if (row != 128) emulated::fail("a box of another width than its swizzle has");
    emulated::start_copy(barrier, int64_t{row} * map.box_tokens, [=] {
        for (int t = 0; t < map.box_tokens; ++t)
            for (int c = 0; c < map.box_columns; ++c) {
                const bool there = token + t < map.tokens && column + c < map.columns;
                const uint16_t number = there ? map.from[(token + t) * map.stride + column + c] : 0;
                std::memcpy(static_cast<char*>(to) + t * row + ((c / 8 ^ t % 8) * 16 + c % 8 * 2), &number, 2);
            }
    });
}

inline void prefetch_map(const BoxMap&) {}

inline int64_t map_boxes(const Boxes& boxes, BoxMap* map) {
    *map = boxes;
    return 0;
}

template <int THREADS>
void sync_threads() {
    emulated::meet(emulated::machine().some, THREADS, [] {});
}

// PTX ISA, "Matrix descriptor": units of 16 bytes; the swizzle of 128 bytes exchanges bits 4..6 of an address with
// themselves and bits 7..9.
inline uint64_t matrix_of(const void* boxes) {
    const auto place = static_cast<const unsigned char*>(boxes) - emulated::machine().shared;
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | static_cast<uint64_t>(place) >> 4;
}
inline uint64_t matrix_at(uint64_t matrix, int bytes) { return matrix + static_cast<uint64_t>(bytes >> 4); }

inline void begin_group() {}
inline void commit_group() {}
template <int PENDING>
void await_groups() {}

// PTX ISA, "Register fragments for wgmma.m64nNk16": a warp's 16 rows of A and of D.
template <class T, int TOKENS>
void multiply_add_group(float (&c)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b, bool adds) {
    struct Operands {
        float* c;
        const uint32_t* a;
        uint64_t b;
        bool adds;
    } own = {c, a, b, adds};
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
                std::memcpy(&number, emulated::machine().shared + at, 2);
                B[k][n] = emulated::decoded(number, T());
            }
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < TOKENS / 2; ++i) {
                const int row = (lane >> 2) + 8 * (i >> 1 & 1), column = 8 * (i >> 2) + lane % 4 * 2 + (i & 1);
                double sum = all[lane]->adds ? all[lane]->c[i] : 0;
                for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
                all[lane]->c[i] = static_cast<float>(sum);
            }
    });
}

template <int COUNT>
void take_registers() {}
template <int COUNT>
void leave_registers() {}

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

inline int64_t current_device(Device* device) {
    *device = emulated::machine().device;
    return 0;
}

template <class Task>
int64_t launch(void (*kernel)(Task), const Launch& launch, const Task& task) {
    emulated::Machine& m = emulated::machine();
    m.failure.clear();
    m.steps = 0;
    m.shared_bytes = launch.shared_bytes;
    if (launch.shared_bytes > (m.device.capability == 90 ? emulated::MOST_SHARED : emulated::OTHERS_SHARED))
        m.failure = "more shared memory than a block has";
    std::mt19937 random(m.seed);
    std::vector<int> order(static_cast<std::size_t>(launch.blocks));
    std::iota(order.begin(), order.end(), 0);
    if (m.seed) std::shuffle(order.begin(), order.end(), random);
    for (std::size_t i = 0; i < order.size() && m.failure.empty(); ++i) {
        m.block = order[i];
        emulated::run_block(launch, [&] { kernel(task); }, random);
    }
    return m.failure.empty() ? 0 : 1;
}

inline const char* device_message(int64_t) { return emulated::machine().failure.c_str(); }

}  // namespace llmquant::cuda

// So many multiprocessors of so a capability; with a seed, threads and blocks take their turns in an order drawn from
// it; `late`: asynchronous copies arrive when they are waited for, and not at once.
LLMQUANT_CUDA_EXPORT void llmquant_emulate(int64_t processors, int64_t capability, int64_t seed, int64_t late);
// The most rows of one 8 x 8 matrix that ldmatrix has found in the same banks since the last call; 1 is no conflict.
LLMQUANT_CUDA_EXPORT int64_t llmquant_emulated_conflicts();
// Walks through a schedule as kernels do, and counts in `done` how often each of the tiles * chunks units is met. 0, or
// what is wrong: 1 units do not follow each other, 2 a tile belongs to other blocks, 3 sums are looked for in another
// slot, 4 a slot is written twice, 5 there are too many blocks, or one with nothing to do.
LLMQUANT_CUDA_EXPORT int64_t llmquant_emulated_schedule(int64_t tiles, int64_t chunks, int64_t blocks, int32_t* done);
