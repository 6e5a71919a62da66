// What the kernels ask of the device beyond C++: one function for each instruction. Compiled without nvcc, the kernels
// run on the CPU instead, one thread of a block at a time: see emulated.h.
#pragma once

#include "schedule.h"

namespace llmquant::cuda {

struct alignas(16) Words {
    uint32_t word[4];
};
struct alignas(16) Floats {
    float value[4];
};

}  // namespace llmquant::cuda

#ifndef __CUDACC__
#include "emulated.h"
#else

#include <cuda_runtime.h>

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
// The first `THREADS` of a block meet, which are whole warps.
template <int THREADS>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}
// Between this thread's accesses to memory, and those that barriers have put before or after them, of the whole device.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// From `lane` of each `width` lanes.
__device__ __forceinline__ float shuffle(float value, int lane, int width) {
    return __shfl_sync(0xffffffff, value, lane, width);
}
// What all lanes have alike, so that the compiler knows it: it may then be held once for all of them.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }
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
__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }

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

struct Launch {
    int64_t blocks;
    int threads;
    int shared_bytes;
    bool overlap;  // may begin before the kernel before it has ended
    void* stream;
    int cluster = 0;     // blocks of one; a divisor of blocks, 8 at most; 0: there are none
    bool dense = false;  // blocks of a cluster may share a multiprocessor, which leaves room for more of them
};

// What CUDA is told of a launch; `attributes` has to stay as long as that.
inline cudaLaunchConfig_t config_of(const Launch& launch, cudaLaunchAttribute (&attributes)[3]) {
    unsigned count = 0;
    if (launch.overlap) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.cluster) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    }
    if (launch.dense) {
        attributes[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
        attributes[count++].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = static_cast<cudaStream_t>(launch.stream);
    config.attrs = attributes;
    config.numAttrs = count;
    return config;
}

template <class Task>
int64_t launch(void (*kernel)(Task), const Launch& launch, const Task& task) {
    if (launch.shared_bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
        if (error) return error;
    }
    cudaLaunchAttribute attributes[3] = {};
    const cudaLaunchConfig_t config = config_of(launch, attributes);
    return cudaLaunchKernelEx(&config, kernel, task);
}

inline const char* device_message(int64_t code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace llmquant::cuda

#endif
