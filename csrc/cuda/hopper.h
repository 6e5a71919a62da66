// What kernels ask of a Hopper device beyond device.h: barriers in shared memory, clusters and the copy engine, which
// newer ones have, too, and warpgroups, which are of sm_90a alone. One function for each instruction. Compiled without
// nvcc, emulated_hopper.h stands for it.
#pragma once

#include "device.h"

namespace llmquant::cuda {

// Tokens and columns of 16-bit numbers in memory, of which the copy engine takes boxes. Past their ends there are
// zeros, and nothing is written.
struct Boxes {
    const uint16_t* numbers;
    int64_t columns, tokens, stride;
    int box_columns, box_tokens;
    bool fp16;
};

constexpr int WARPGROUP = 4 * LANES;  // its threads

}  // namespace llmquant::cuda

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

#include <cuda.h>

// The instructions of sm_90a, which no other device has, may stand in what is compiled.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LLMQUANT_WGMMA
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LLMQUANT_CLUSTERS
#endif

namespace llmquant::cuda {

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

// A cluster: blocks that run at the same time, and write to each other's shared memory.
__device__ __forceinline__ int rank_in_cluster() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ int blocks_of_cluster() {
    int blocks;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    return blocks;
}
__device__ __forceinline__ int cluster_index() {
    int index;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}
// All threads of a cluster arrive, and then await each other. What they have written is not waited for.
__device__ __forceinline__ void arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void await_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// At the barrier that is where `barrier` is in this block, in the block of that rank. That is no word on what this
// block has written: a release to the cluster would be a fence of the device.
__device__ __forceinline__ void arrive_at(Barrier* barrier, int rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}
// To the place that `to` is in this block, in the block of that rank, whose `barrier` is told of the bytes.
__device__ __forceinline__ void send(float* to, int rank, float value, Barrier* barrier) {
    uint32_t there, told;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(told) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(there),
                 "r"(__float_as_uint(value)), "r"(told)
                 : "memory");
}
__device__ __forceinline__ void send(Floats* to, int rank, const Floats& four, Barrier* barrier) {
    uint32_t there, told;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(told) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
        "f"(four.value[0]), "f"(four.value[1]), "f"(four.value[2]), "f"(four.value[3]), "r"(told)
        : "memory");
}

// Until all that was sent to this block is there: the first phase of that barrier, as the whole cluster sees it.
__device__ __forceinline__ void await_sent(Barrier* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], 0;\n"
        "@!ended bra again;\n"
        "}" ::"r"(shared_address(barrier))
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

// The same to this place in both blocks of a cluster of two, and their barriers are told.
__device__ __forceinline__ void copy_box_to_both(void* to, const BoxMap& map, int column, int token, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(token), "r"(shared_address(barrier)),
        "h"(static_cast<uint16_t>(3))
        : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers, of which each lane has two of a row, become rows in shared memory of what were
// their columns; this lane names where one of them goes.
__device__ __forceinline__ void store_transposed(const uint32_t (&pairs)[4], void* row) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
}
// What this thread has written to shared memory is there for the copy engine.
__device__ __forceinline__ void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The way back of copy_box: what is past the ends is left out. Boxes of this thread leave together, and are awaited
// until they have been read from shared memory.
__device__ __forceinline__ void leave_box(const void* from, const BoxMap& map, int column, int token) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(reinterpret_cast<uint64_t>(&map)),
        "r"(column), "r"(token), "r"(shared_address(from))
        : "memory");
}
__device__ __forceinline__ void await_left() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

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
               const_cast<uint16_t*>(boxes.numbers), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return error ? cudaErrorInvalidValue : cudaSuccess;
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

// c += A B for 64 rows, 16 of each warp, TOKENS tokens and 16 columns. Lanes hold A and C as for mma.m16n8k16.
template <class T, int TOKENS>
__device__ __forceinline__ void multiply_add_group(float (&c)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b);

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
#define LLMQUANT_N64                                                                     \
    LLMQUANT_N32                                                                         \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LLMQUANT_N128                                                                              \
    LLMQUANT_N64                                                                                   \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// N tokens have C = N / 2 registers; those of A and B follow them.
#define LLMQUANT_MULTIPLY_ADD(T, KIND, N, C, A0, A1, A2, A3, B)                                                   \
    template <>                                                                                                   \
    __device__ __forceinline__ void multiply_add_group<T, N>(float (&c)[C], const uint32_t (&a)[4], uint64_t b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND " {" LLMQUANT_N##C           \
                     "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", 1, 1, 1, 0;"                                    \
                     : LLMQUANT_C##C(0)                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                       \
    }
#define LLMQUANT_MULTIPLY_ADD_BOTH(...)             \
    LLMQUANT_MULTIPLY_ADD(Fp16, "f16", __VA_ARGS__) \
    LLMQUANT_MULTIPLY_ADD(Bf16, "bf16", __VA_ARGS__)
LLMQUANT_MULTIPLY_ADD_BOTH(8, 4, "%4", "%5", "%6", "%7", "%8")
LLMQUANT_MULTIPLY_ADD_BOTH(16, 8, "%8", "%9", "%10", "%11", "%12")
LLMQUANT_MULTIPLY_ADD_BOTH(32, 16, "%16", "%17", "%18", "%19", "%20")
LLMQUANT_MULTIPLY_ADD_BOTH(64, 32, "%32", "%33", "%34", "%35", "%36")
LLMQUANT_MULTIPLY_ADD_BOTH(128, 64, "%64", "%65", "%66", "%67", "%68")
LLMQUANT_MULTIPLY_ADD_BOTH(256, 128, "%128", "%129", "%130", "%131", "%132")

// Until all of them are there; the sums as well, for the compiler, which may read them before a wait that it sees no
// connection with.
template <int ROWS, int COUNT>
__device__ __forceinline__ void await_sums(float (&sums)[ROWS][COUNT]) {
    await_groups<0>();
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COUNT; ++j) asm volatile("" : "+f"(sums[i][j]));
}

// The threads of a warpgroup meet, which is that one of its block.
__device__ __forceinline__ void sync_warpgroup(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 2), "n"(WARPGROUP) : "memory");  // 0 and 1 are those of device.h
}

// How many registers each thread of this warpgroup has from here on.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace llmquant::cuda

#endif
