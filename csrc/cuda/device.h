// What the kernels ask of the device beyond C++: one function for each instruction. Compiled without nvcc, the kernels
// run on the CPU instead, one thread of a block at a time: see emulated.h.
#pragma once

#include "layout.h"

namespace llmquant::cuda {

struct alignas(16) Words {
    uint32_t word[4];
};
struct alignas(16) Floats {
    float value[4];
};

// Tokens and columns of 16-bit numbers in memory, of which the copy engine takes boxes; past their ends there are
// zeros.
struct Boxes {
    const uint16_t* from;
    int64_t columns, tokens, stride;
    int box_columns, box_tokens;
    bool fp16;
};

}  // namespace llmquant::cuda

#ifndef __CUDACC__
#include "emulated.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

// The instructions of sm_90a, which no other device has, may stand in what is compiled.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LLMQUANT_WGMMA
#endif

namespace llmquant::cuda {

// Asked for anew at each call: what follows from it is computed where it is needed, and keeps no registers in between.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}
__device__ __forceinline__ int block_index() {
    int index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}
__device__ __forceinline__ int threads_of_block() { return static_cast<int>(blockDim.x); }

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

__device__ __forceinline__ void trap() { __trap(); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Between this thread's accesses to memory, and those that barriers have put before or after them, of the whole device.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// From `lane` of each `width` lanes.
__device__ __forceinline__ float shuffle(float value, int lane, int width) {
    return __shfl_sync(0xffffffff, value, lane, width);
}
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }

// Weights are read once: they need no place in L1, and the first to leave L2 are they. (A policy is made where it is
// needed, and keeps no registers in between.)
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t evict_normal() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Into the registers that `words` has: nothing is left to copy, which would wait for what is on its way.
__device__ __forceinline__ void load_once(Words& words, const Words* from, bool wanted, uint64_t policy) {
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.s32 wanted, %6, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"
        "}"
        : "+r"(words.word[0]), "+r"(words.word[1]), "+r"(words.word[2]), "+r"(words.word[3])
        : "l"(from), "l"(policy), "r"(static_cast<int>(wanted)));
}

// What another block wrote: from L2, as L1 may hold older values.
__device__ __forceinline__ float load_fresh(const float* from) { return __ldcg(from); }
__device__ __forceinline__ Floats load_fresh(const Floats* from) {
    const float4 loaded = __ldcg(reinterpret_cast<const float4*>(from));
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}

// 16 bytes to shared memory, of which the first `bytes` are read and the others are zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_async_once(void* to, const void* from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of this thread's groups of copies but the last `PENDING` have arrived.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; this lane names a row of one of them.
__device__ __forceinline__ void load_matrices(uint32_t (&b)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += A B for 16 rows, 8 tokens, 16 columns.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// (a & b) | c: one instruction, where two constants would otherwise make it two.
__device__ __forceinline__ uint32_t merge(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Two numbers in a word: a b + c, rounded once. (bf16 has no other arithmetic before sm_90.)
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma2<Fp16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
__device__ __forceinline__ uint32_t fma2<Bf16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }

template <class T>
__device__ __forceinline__ float to_float(uint32_t bits);  // of the low 16
template <>
__device__ __forceinline__ float to_float<Fp16>(uint32_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
}
template <>
__device__ __forceinline__ float to_float<Bf16>(uint32_t bits) {
    return as_float(bits << 16);
}

template <class T>
__device__ __forceinline__ uint32_t to_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t to_pair<Fp16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <>
__device__ __forceinline__ uint32_t to_pair<Bf16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Counts to `last` and starts again at zero; true for the one that found it there.
__device__ __forceinline__ bool draw_ticket(uint32_t* tickets, uint32_t last) {
    return atomicInc(tickets, last) == last;
}

// ---- sm_90a: warpgroups and the copy engine

// An mbarrier: a phase ends when all arrivals and all bytes that were expected are there.
using Barrier = uint64_t;

__device__ __forceinline__ void begin_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// For the copy engine to see barriers that have begun.
__device__ __forceinline__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and so many bytes are to come.
__device__ __forceinline__ void expect_bytes(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void await_phase(Barrier* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

using BoxMap = CUtensorMap;

__device__ __forceinline__ void prefetch_map(const BoxMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// The box that begins at a column and token. Its rows are 128 bytes; granule g of token t is in place g ^ (t % 8).
__device__ __forceinline__ void copy_box(void* to, const BoxMap& map, int column, int token, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(token), "r"(shared_address(barrier))
        : "memory");
}

inline int64_t map_boxes(const Boxes& boxes, BoxMap* map) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    if (!encode) return cudaErrorCallRequiresNewerDriver;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(boxes.columns), static_cast<cuuint64_t>(boxes.tokens)};
    const cuuint64_t strides[] = {2 * static_cast<cuuint64_t>(boxes.stride)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(boxes.box_columns), static_cast<cuuint32_t>(boxes.box_tokens)};
    const cuuint32_t steps[] = {1, 1};
    const CUresult error =
        encode(map, boxes.fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
               const_cast<uint16_t*>(boxes.from), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return error ? cudaErrorInvalidValue : cudaSuccess;
}

// The first `THREADS` of a block meet, which are whole warps.
template <int THREADS>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Matrix B of an instruction, in shared memory: tokens are rows of 128 bytes, as copy_box leaves them; 8 of them are
// 1024 bytes. (PTX ISA, "Matrix descriptor", with the swizzle of 128 bytes.)
__device__ __forceinline__ uint64_t matrix_of(const void* boxes) {
    constexpr uint64_t EIGHT_ROWS = 1024 >> 4, SWIZZLE_128 = 1;
    return SWIZZLE_128 << 62 | EIGHT_ROWS << 32 | uint64_t{1} << 16 | (shared_address(boxes) & 0x3ffff) >> 4;
}
__device__ __forceinline__ uint64_t matrix_at(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

// Instructions between begin and commit are a group; registers that they read or write belong to them until they are
// awaited.
__device__ __forceinline__ void begin_group() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void await_groups() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// c = A B for 64 rows, 16 of each warp, TOKENS tokens and 16 columns, or c += A B if it `adds`. Lanes hold A and C as
// for mma.m16n8k16.
template <class T, int TOKENS>
__device__ __forceinline__ void multiply_add_group(float (&c)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b,
                                                   bool adds);

#define LLMQUANT_C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define LLMQUANT_C8(i) LLMQUANT_C4(i), LLMQUANT_C4(i + 4)
#define LLMQUANT_C16(i) LLMQUANT_C8(i), LLMQUANT_C8(i + 8)
#define LLMQUANT_C32(i) LLMQUANT_C16(i), LLMQUANT_C16(i + 16)
#define LLMQUANT_C64(i) LLMQUANT_C32(i), LLMQUANT_C32(i + 32)
#define LLMQUANT_C128(i) LLMQUANT_C64(i), LLMQUANT_C64(i + 64)
#define LLMQUANT_N4 "%0, %1, %2, %3"
#define LLMQUANT_N8 LLMQUANT_N4 ", %4, %5, %6, %7"
#define LLMQUANT_N16 LLMQUANT_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LLMQUANT_N32 LLMQUANT_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LLMQUANT_N64                                                                         \
    LLMQUANT_N32                                                                             \
        ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LLMQUANT_N128                                                                                  \
    LLMQUANT_N64                                                                                       \
        ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// N tokens have C = N / 2 registers; those of A, B and a predicate follow them.
#define LLMQUANT_MULTIPLY_ADD(T, KIND, N, C, A0, A1, A2, A3, B, ON)                                                    \
    template <>                                                                                                        \
    __device__ __forceinline__ void multiply_add_group<T, N>(float (&c)[C], const uint32_t (&a)[4], uint64_t b,        \
                                                             bool adds) {                                              \
        asm volatile(                                                                                                  \
            "{\n"                                                                                                      \
            ".reg .pred adds;\n"                                                                                       \
            "setp.ne.b32 adds, " ON                                                                                    \
            ", 0;\n"                                                                                                   \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND " {" LLMQUANT_N##C "}, {" A0 ", " A1       \
                                                                                               ", " A2 ", " A3 "}, " B \
                                                                                               ", adds, 1, 1, 0;\n"    \
                                                                                               "}"                     \
            : LLMQUANT_C##C(0)                                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{adds}));                                     \
    }
#define LLMQUANT_MULTIPLY_ADD_BOTH(...)             \
    LLMQUANT_MULTIPLY_ADD(Fp16, "f16", __VA_ARGS__) \
    LLMQUANT_MULTIPLY_ADD(Bf16, "bf16", __VA_ARGS__)
LLMQUANT_MULTIPLY_ADD_BOTH(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
LLMQUANT_MULTIPLY_ADD_BOTH(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
LLMQUANT_MULTIPLY_ADD_BOTH(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
LLMQUANT_MULTIPLY_ADD_BOTH(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
LLMQUANT_MULTIPLY_ADD_BOTH(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
LLMQUANT_MULTIPLY_ADD_BOTH(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

// How many registers each thread of this warpgroup has from here on.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Of an 8 x 8 matrix of 16-bit numbers, of which each lane has two of a row.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t pair) {
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

__device__ __forceinline__ uint32_t pick_bytes(uint32_t word, uint32_t selector) {
    return __byte_perm(word, 0, selector);
}

// Programmatic dependent launch: the next kernel of the stream may begin; until the one before has ended.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Device {
    int processors;  // multiprocessors
    int capability;  // 80, 86, 89, 90, ..
};

inline int64_t current_device(Device* device) {
    int index = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (!error) error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, index);
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    device->capability = 10 * major + minor;
    return error;
}

struct Launch {
    int64_t blocks;
    int threads;
    int shared_bytes;
    bool overlap;  // may begin before the kernel before it has ended
    void* stream;
};

template <class Task>
int64_t launch(void (*kernel)(Task), const Launch& launch, const Task& task) {
    if (launch.shared_bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
        if (error) return error;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = static_cast<cudaStream_t>(launch.stream);
    config.attrs = &attribute;
    config.numAttrs = launch.overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, task);
}

inline const char* device_message(int64_t code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace llmquant::cuda

#endif
