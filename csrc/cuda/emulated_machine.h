// The threads of a block as fibers, where they meet, and what copies of theirs are on their way: what the instructions
// of emulated.h and emulated_hopper.h are made of.
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

#include "layout.h"

namespace llmquant::cuda {

using std::max;
using std::min;

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
    std::map<const void*, Phase> barriers;
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

}  // namespace llmquant::cuda
