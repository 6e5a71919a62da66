// The C interface: choose an instruction set, share the rows between threads.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention.h"
#include "decode.h"
#include "dense.h"
#include "levels.h"
#include "linear.h"
#include "solve.h"
#include "walk.h"

namespace llmquant {

// An Intel processor with AMX was faster for it: a short panel ends before it has noticed that it is a stream. An AMD
// EPYC with AVX-512 was a tenth to a fifth slower.
const int64_t ahead_of_reading = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return int64_t{__builtin_cpu_is("intel") ? 1 << 11 : 0};
#else
    return int64_t{0};
#endif
}();

namespace {

struct Level {
    const char* name;
    const AttentionKernels* attention;
    const DecodeKernels* decode;
    const DenseKernels* dense;
    const LinearKernels* linear;
    const SolveKernels* solve;
    bool usable;
};

#if defined(__x86_64__)
bool supports_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
}
#endif

#if defined(LLMQUANT_AMX)
// Linux wants to be asked before a process uses tiles: their state is large.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILE_DATA
    return __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

const Level* levels() {
    static const Level all[] = {
#if defined(LLMQUANT_AMX)
        {"AMX", &avx512bf16::attention, &avx512::decode, &amx::dense, &amx::linear, &avx512::solve,
         may_use_tiles() && supports_avx512() && __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512bf16")},
#endif
#if defined(__x86_64__)
        {"AVX-512 BF16", &avx512bf16::attention, &avx512::decode, &avx512::dense, &avx512vnni::linear, &avx512::solve,
         supports_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")},
        {"AVX-512 VNNI", &avx512::attention, &avx512::decode, &avx512::dense, &avx512vnni::linear, &avx512::solve,
         supports_avx512() && __builtin_cpu_supports("avx512vnni")},
        {"AVX-512", &avx512::attention, &avx512::decode, &avx512::dense, &avx512::linear, &avx512::solve,
         supports_avx512()},
        {"AVX2", &avx2::attention, &avx2::decode, &avx2::dense, &avx2::linear, &avx2::solve,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {"baseline", &baseline::attention, &baseline::decode, &baseline::dense, &baseline::linear, &baseline::solve,
         true},
        {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, true},
    };
    return all;
}

const Level& usable_level(int64_t index) {
    const Level* level = levels();
    while (level->name && !(level->usable && index-- == 0)) ++level;
    return *level;
}

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // products; below that, waking a thread takes longer than the work

// `work(first, last)` for consecutive ranges of whole tiles that cover all rows (or tokens, or panels). Each is one
// thread's, so results never depend on the number of threads.
template <typename Work>
void share(int64_t rows, int64_t tile, int64_t threads, int64_t products, Work work) {
    const int64_t tiles = (rows + tile - 1) / tile;
    const int64_t parts = std::max<int64_t>(1, std::min({threads, tiles, products / WORTH_A_THREAD}));
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; ++part)
        work(tiles * part / parts * tile, std::min(rows, tiles * (part + 1) / parts * tile));
}

// So many tokens for each thread, and each goes its way with its own: what one thread has written, another reads
// slowly.
constexpr int64_t OWN_TOKENS = 32;

LlmquantLinear tokens_of(const LlmquantLinear& task, int64_t first, int64_t last) {
    const int64_t size = bytes_of(task.x_kind);
    LlmquantLinear part = task;
    part.x = static_cast<const char*>(task.x) + first * task.columns * size;
    part.y = static_cast<char*>(task.y) + first * task.rows * size;
    part.tokens = last - first;
    return part;
}

// Room for the activations of a task as integers; without planes, if there is no memory.
struct Room {
    explicit Room(const LlmquantLinear& task) {
        const int64_t tokens = (task.tokens + LLMQUANT_TILE - 1) / LLMQUANT_TILE * LLMQUANT_TILE;
        const auto blocks = static_cast<std::size_t>(tokens * blocks_of(task));
        planes.reset(
            new (std::nothrow)
                int8_t[static_cast<std::size_t>(tokens * task.planes * (padded(task.columns) + LLMQUANT_CHUNK))]);
        scales.reset(new (std::nothrow) float[blocks]);
        sums.reset(new (std::nothrow) int32_t[blocks]);
        if (planes && scales && sums) x = {planes.get(), scales.get(), sums.get()};
    }

    std::unique_ptr<int8_t[]> planes;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<int32_t[]> sums;
    Integers x = {};
};

}  // namespace
}  // namespace llmquant

int64_t llmquant_abi() { return 7; }

const char* llmquant_level(int64_t level) { return llmquant::usable_level(level).name; }

int64_t llmquant_threaded() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

void llmquant_release_threads() {
#if defined(_OPENMP) && (defined(__clang__) || __GNUC__ >= 9)
    omp_pause_resource_all(omp_pause_soft);
#endif
}

int64_t llmquant_linear(const LlmquantLinear* task) {
    const llmquant::LinearKernels& kernels = *llmquant::usable_level(task->level).linear;
    const int64_t products = task->tokens * task->rows * task->columns, panels = llmquant::panels_of(*task);
    std::atomic<bool> failed = false;
    if (task->tokens >= task->threads * llmquant::OWN_TOKENS) {
        llmquant::share(task->tokens, 4, task->threads, products, [&](int64_t first, int64_t last) {
            const LlmquantLinear own = llmquant::tokens_of(*task, first, last);
            const llmquant::Room room(own);
            if (!room.x.planes) {
                failed = true;
                return;
            }
            kernels.to_integers(own, room.x, 0, own.tokens);
            kernels.multiply(own, room.x, 0, panels);
        });
        return failed;
    }
    const llmquant::Room room(*task);
    if (!room.x.planes) return 1;
    llmquant::share(task->tokens, 1, task->threads, task->tokens * task->columns,
                    [&](int64_t first, int64_t last) { kernels.to_integers(*task, room.x, first, last); });
    llmquant::share(panels, 1, task->threads, products,
                    [&](int64_t first, int64_t last) { kernels.multiply(*task, room.x, first, last); });
    return 0;
}

int64_t llmquant_attention(const LlmquantAttention* task) {
    const llmquant::AttentionKernels& kernels = *llmquant::usable_level(task->level).attention;
    const int64_t items = kernels.items(*task);
    const auto scratch = static_cast<std::size_t>(kernels.scratch(*task));
    std::atomic<bool> failed = false;
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(std::min(task->threads, items)))
#endif
    {
        const std::unique_ptr<float[]> own(new (std::nothrow) float[scratch]);
        if (!own) failed = true;
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)  // items differ in length, but not in what they compute
#endif
        for (int64_t item = 0; item < items; ++item)
            if (own) kernels.attend(*task, item, own.get());
    }
    return failed;
}

int64_t llmquant_decode(const LlmquantStep* step) {
    const llmquant::Level& level = llmquant::usable_level(step->level);
    try {
        llmquant::Walk walk(*step, *level.decode, *level.linear);
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(step->threads))
        walk.go(omp_get_thread_num(), omp_get_num_threads());
#else
        walk.go(0, 1);
#endif
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

int64_t llmquant_dense(const LlmquantDense* task) {
    const llmquant::DenseKernels& kernels = *llmquant::usable_level(task->level).dense;
    const std::unique_ptr<char[]> x(new (std::nothrow) char[static_cast<std::size_t>(kernels.room(*task))]);
    if (!x) return 1;
    kernels.prepare(*task, x.get());
    llmquant::share(task->rows, LLMQUANT_PANEL, task->threads, task->tokens * task->rows * task->columns,
                    [&](int64_t first, int64_t last) { kernels.multiply(*task, x.get(), first, last); });
    return 0;
}

void llmquant_round_columns(const LlmquantColumns* task) {
    const llmquant::SolveKernels& kernels = *llmquant::usable_level(task->level).solve;
    llmquant::share(task->rows, kernels.tile, task->threads, task->rows * task->columns * task->columns,
                    [&](int64_t first, int64_t last) { kernels.round_columns(*task, first, last); });
}

void llmquant_search_grids(const LlmquantColumns* task) {
    const llmquant::SolveKernels& kernels = *llmquant::usable_level(task->level).solve;
    llmquant::share(task->rows, kernels.tile, task->threads, task->rows * task->columns * task->candidate_count,
                    [&](int64_t first, int64_t last) { kernels.search_grids(*task, first, last); });
}
