// The threads of a block, or of a cluster of them, as fibers, where they meet, and what copies of theirs are on their
// way: what the instructions of emulated.h and emulated_hopper.h are made of.
#pragma once

#include <ucontext.h>

#include <algorithm>
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

#include "schedule.h"

namespace llmquant::cuda {

using std::max;
using std::min;

struct Launch {
    int64_t blocks;
    int threads;
    int shared_bytes;
    bool overlap;
    void* stream;
    int cluster = 0;
    bool dense = false;
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
    int64_t awaited = 0;  // round of the cluster's meeting
    std::vector<std::vector<Copy>> groups;
    std::vector<std::function<void()>> leaving;  // copies from shared memory
    bool unseen = false;                         // it has written what the copy engine does not see yet
};

// Where threads wait for each other.
struct Meeting {
    int arrived = 0;
    int64_t round = 0;
    void* operands[LANES] = {};
};

struct alignas(1024) Shared {
    unsigned char bytes[MOST_SHARED];
};

struct Block {
    int index = 0;
    bool begun = false;
    std::vector<Thread> threads;
    std::vector<Meeting> warps;
    Meeting everyone, some, warpgroups[2];
    std::map<const void*, Phase> barriers;
    std::unique_ptr<Shared> memory;

    bool ended() const {
        return std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.ended; });
    }
};

struct Machine {
    Device device = {2, 90, {{2, 1}, {4, 2, 1}}};
    uint32_t seed = 0;
    bool late = false;  // copies arrive when they are waited for

    std::vector<Block> cluster;  // the blocks that run now
    bool in_clusters = false;    // as the launch said, though it may be clusters of one
    Meeting all;                 // of their threads
    ucontext_t scheduler;
    int member = 0, running = 0;  // the block that has its turn, and its thread
    int shared_bytes = 0;
    int worst_conflict = 0;  // of ldmatrix and stmatrix: rows of one matrix in the same banks; 1 is none
    std::string failure;
    int64_t steps = 0;  // of the scheduler: when nothing moves on any more, threads wait for each other forever
};

inline Machine& machine() {
    static Machine one;
    return one;
}

inline Block& own_block() { return machine().cluster[static_cast<std::size_t>(machine().member)]; }
inline Thread& own_thread() { return own_block().threads[static_cast<std::size_t>(machine().running)]; }
inline unsigned char* own_memory() { return own_block().memory->bytes; }

inline void yield() { swapcontext(&own_thread().context, &machine().scheduler); }

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
    const int running = machine().running;
    Meeting& warp = own_block().warps[static_cast<std::size_t>(running / LANES)];
    warp.operands[running % LANES] = &own;
    meet(warp, LANES, [&] { work(reinterpret_cast<Operands**>(warp.operands)); });
}

// Of the 8 rows of a matrix, 16 bytes each, that are read or written at once.
template <class Row>
void count_conflicts(Row row) {
    int rows_in[8] = {};  // each 16 bytes wide group of banks
    for (int i = 0; i < 8; ++i) ++rows_in[(row(i) - own_memory()) / 16 % 8];
    machine().worst_conflict = max(machine().worst_conflict, *std::max_element(rows_in, rows_in + 8));
}

// A thread that will run `body` when it has its turn.
inline void begin(Thread& thread, void (*body)()) {
    if (!thread.stack) thread.stack.reset(new char[STACK]);
    thread.ended = false;
    thread.awaited = 0;
    thread.groups.assign(1, {});
    thread.leaving.clear();
    thread.unseen = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, body, 0);
}

// Runs `body` in every thread of the blocks from `first` on that are a cluster.
template <class Body>
void run_cluster(const Launch& launch, int cluster, int first, const Body& body, std::mt19937& random) {
    Machine& m = machine();
    const auto count = static_cast<std::size_t>(launch.threads);
    m.cluster.resize(static_cast<std::size_t>(cluster));
    m.all = Meeting();

    static const Body* current;
    current = &body;
    std::vector<std::pair<int, int>> order;  // members and their threads
    for (int member = 0; member < cluster; ++member) {
        Block& block = m.cluster[static_cast<std::size_t>(member)];
        block.index = first + member;
        block.begun = false;
        block.warps.assign(count / LANES, Meeting());
        block.everyone = block.some = block.warpgroups[0] = block.warpgroups[1] = Meeting();
        block.barriers.clear();
        if (!block.memory) block.memory.reset(new Shared);
        std::memset(block.memory->bytes, 0xff, MOST_SHARED);
        block.threads.resize(count);
        for (std::size_t i = 0; i < count; ++i) {
            begin(
                block.threads[i], +[] {
                    (*current)();
                    if (!own_thread().leaving.empty()) fail("a copy from a block's memory that is over before it");
                    own_thread().ended = true;
                    yield();
                });
            order.emplace_back(member, static_cast<int>(i));
        }
    }
    if (m.seed) std::shuffle(order.begin(), order.end(), random);
    // Some have a turn only when the others have come as far as they can without them: a block, or four warps of one.
    constexpr int FOUR_WARPS = 4 * LANES;
    const auto draw = [&](int count) { return static_cast<int>(random() % static_cast<unsigned>(count)); };
    int slow = m.seed ? draw(cluster) : -1, slow_first = 0, slow_end = launch.threads;
    if (cluster == 1 || draw(2)) {
        slow_first = draw(max(1, launch.threads / FOUR_WARPS)) * FOUR_WARPS;
        slow_end = slow_first + FOUR_WARPS;
    }
    for (bool going = true; going && m.failure.empty();) {
        going = false;
        const bool held = m.steps < 3;
        bool left = false;
        for (const auto& [member, index] : order) {
            m.member = member;
            m.running = index;
            Thread& thread = own_thread();
            if (thread.ended || !m.failure.empty()) continue;
            if (held && member == slow && index >= slow_first && index < slow_end) {
                left = true;
                continue;
            }
            going = own_block().begun = true;
            swapcontext(&m.scheduler, &thread.context);
            if (thread.ended) m.steps = 0;
        }
        if (!going && left) {  // it is alone
            slow = -1;
            going = true;
        } else if (++m.steps > 4) {
            m.failure = "threads wait for others that never come";
        }
    }
}

}  // namespace emulated

}  // namespace llmquant::cuda
