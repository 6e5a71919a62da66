// The C interface: choose an instruction set, share the rows between threads.

#include "linear.h"

#include <algorithm>
#include <memory>
#include <new>

namespace llmquant {
namespace {

struct Level {
    const char* name;
    const Kernels* kernels;
    bool usable;
};

const Level* levels() {
    static const Level all[] = {
#if defined(__x86_64__)
        {"AVX-512", &avx512, __builtin_cpu_supports("avx512f") != 0},
        {"AVX2", &avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {"baseline", &baseline, true},
        {nullptr, nullptr, true},
    };
    return all;
}

const Level& usable_level(int64_t index) {
    const Level* level = levels();
    while (level->name && !(level->usable && index-- == 0)) ++level;
    return *level;
}

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // products; below that, waking a thread takes longer than the work

// `work(first, last)` for consecutive ranges that cover all rows. Each row is one thread's, so sums never depend on
// the number of threads.
template <typename Work>
void share_rows(const LlmquantLinear& task, int64_t products, Work work) {
    const int64_t parts = std::max<int64_t>(1, std::min(task.threads, products / WORTH_A_THREAD));
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; ++part) work(task.rows * part / parts, task.rows * (part + 1) / parts);
}

}  // namespace
}  // namespace llmquant

int64_t llmquant_abi() { return 1; }

const char* llmquant_level(int64_t level) { return llmquant::usable_level(level).name; }

int64_t llmquant_threaded() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

int64_t llmquant_linear(const LlmquantLinear* task) {
    const llmquant::Kernels& kernels = *llmquant::usable_level(task->level).kernels;
    const auto size = static_cast<std::size_t>(task->tokens * kernels.padded(task->columns));
    const std::unique_ptr<float[]> arranged(new (std::nothrow) float[size]);
    if (!arranged) return 1;
    kernels.arrange(*task, arranged.get());
    llmquant::share_rows(*task, task->tokens * task->rows * task->columns,
                         [&](int64_t first, int64_t last) { kernels.multiply(*task, arranged.get(), first, last); });
    return 0;
}

void llmquant_dequantize(const LlmquantLinear* task) {
    const llmquant::Kernels& kernels = *llmquant::usable_level(task->level).kernels;
    llmquant::share_rows(*task, task->rows * task->columns,
                         [&](int64_t first, int64_t last) { kernels.dequantize(*task, first, last); });
}
