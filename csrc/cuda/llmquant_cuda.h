/* Products with INT4 weights on NVIDIA GPUs, from sm_80 on: the interface, in plain C.
 *
 *   y[t][r] = bias[r] + sum_i x[t][i] * scales[r][i / group] * (codes[r][i] - zeros[r][i / group])
 *
 * Every function works asynchronously on the stream that it is given (a cudaStream_t as void*; null: the default one),
 * allocates nothing, and never waits for the device, so that all of them can be captured in a CUDA graph. Pointers are
 * to device memory unless said otherwise. Every function returns 0, a negative code of its own, or a positive
 * cudaError_t; llmquant_cuda_message turns any of them into a sentence. Results do not depend on timing: same
 * arguments, same device, same bits.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
#define LLMQUANT_CUDA_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define LLMQUANT_CUDA_EXPORT
#endif

#define LLMQUANT_CUDA_ABI 6 /* a change of anything below needs a new value */

/* Kinds of numbers, numbered as in csrc/cpu/linear.h. */
enum { LLMQUANT_CUDA_BF16, LLMQUANT_CUDA_FP16, LLMQUANT_CUDA_FP32 };

/* What can compute a product. */
enum {
    LLMQUANT_CUDA_AUTO,       /* what the table of path.h says */
    LLMQUANT_CUDA_GEMV,       /* at most 8 tokens: the weights stream by once */
    LLMQUANT_CUDA_CLUSTER,    /* at most 8, on sm_90 and later: as gemv, but blocks add up their sums in clusters */
    LLMQUANT_CUDA_GEMM,       /* any number of tokens */
    LLMQUANT_CUDA_WGMMA,      /* any number of tokens, on sm_90 alone */
    LLMQUANT_CUDA_PAIRS,      /* the same for more than 64, and two blocks share what they read of the activations */
    LLMQUANT_CUDA_BOXES,      /* as pairs, but the copy engine takes results away while the next ones are computed */
    LLMQUANT_CUDA_SPLIT,      /* as wgmma, but the blocks of a cluster have a tile's columns, and add up their sums */
    LLMQUANT_CUDA_DEQUANTIZE, /* not done here: the caller dequantizes slabs of rows and multiplies them by cuBLAS */
};

/* What a function returns when it does nothing. */
enum {
    LLMQUANT_CUDA_BAD_SIZE = -1,      /* a size is not positive or too large, or a slab is outside of the weight */
    LLMQUANT_CUDA_BAD_GROUP = -2,     /* group is neither 32, 64, 128, 256, .. nor at least the columns */
    LLMQUANT_CUDA_BAD_KIND = -3,      /* these kinds of numbers are not served together */
    LLMQUANT_CUDA_BAD_ALIGNMENT = -4, /* a pointer or stride is not a multiple of 16 bytes, where it has to be */
    LLMQUANT_CUDA_BAD_PATH = -5,      /* the path cannot compute this product */
    LLMQUANT_CUDA_NO_ROOM = -6,       /* the workspace is smaller than llmquant_cuda_workspace asks for */
    LLMQUANT_CUDA_OLD_DEVICE = -7,    /* the device is older than sm_80 */
};

/* A packed weight, in the layout of layout.h; docs/cuda.md has it in closed form. 3-bit codes are held as 4-bit ones,
 * with zeros. Each part begins at a multiple of 16 bytes. */
typedef struct LlmquantCudaWeight {
    void* codes;  /* uint32 [tiles][steps][32][4]: tiles of 64 rows, steps of 16 columns */
    void* scales; /* scale_kind [tiles][groups][64] */
    void* zeros;  /* uint32 [tiles][groups][8]; null: 8 everywhere */
    int64_t rows, columns;
    int64_t group;      /* columns that share a scale: a power of two from 32 on, or columns and more: all */
    int64_t scale_kind; /* bf16 or fp16; every scale is below 65536 */
} LlmquantCudaWeight;

/* Bytes of the three parts: sizes[0] codes, sizes[1] scales, sizes[2] zeros. Reads no pointer of `weight`; needs no
 * device. `sizes` is in host memory. */
LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_sizes(const LlmquantCudaWeight* weight, int64_t* sizes);

/* From codes [rows][columns], scales [rows][groups] (rounded to scale_kind) and zeros [rows][groups] (read only if
 * weight->zeros is not null) to the layout, and back. */
LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_pack(const LlmquantCudaWeight* weight, const uint8_t* codes,
                                                const float* scales, const uint8_t* zeros, void* stream);
LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_unpack(const LlmquantCudaWeight* weight, uint8_t* codes, float* scales,
                                                  uint8_t* zeros, void* stream);

/* Rows [first, first + count) as numbers of `kind` (any of the three), rounded once: to out [count][columns]. `first`
 * is a multiple of 64. */
LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_dequantize(const LlmquantCudaWeight* weight, int64_t first, int64_t count,
                                                      int64_t kind, void* out, void* stream);

typedef struct LlmquantCudaLinear {
    LlmquantCudaWeight weight; /* scale_kind is kind */
    const void* x;             /* [tokens][x_stride], aligned to 16 bytes; what follows the columns is not read */
    const void* bias;          /* [rows]; null: none */
    void* y;                   /* [tokens][rows], aligned to 16 bytes */
    int64_t tokens;
    int64_t x_stride;  /* numbers from one token to the next: a multiple of 8, at least columns */
    int64_t kind;      /* of x and y: bf16 or fp16 */
    int64_t bias_kind; /* any of the three */
    int64_t path;
    /* 1: on sm_90 and later this may begin while the kernel before it on the stream still runs (programmatic dependent
     * launch). x, bias and y may come from, or be in use by, that kernel; the weight may not. */
    int64_t overlap;
    void* partials;    /* scratch, aligned to 16 bytes; one per stream; its contents do not matter */
    uint32_t* tickets; /* zeros before the first call, and again after every call; one per stream */
    int64_t partials_bytes, tickets_count; /* their sizes */
} LlmquantCudaLinear;

/* Which path the table chooses for so many tokens on the current device, or the one that task->path names, if it can
 * compute this: one of LLMQUANT_CUDA_GEMV, _CLUSTER, _GEMM, _WGMMA, _PAIRS, _BOXES, _SPLIT and _DEQUANTIZE; or an
 * error. */
LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_path(const LlmquantCudaLinear* task);

/* What llmquant_cuda_linear needs: sizes[0] bytes of partials, sizes[1] tickets. `sizes` is in host memory. */
LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_workspace(const LlmquantCudaLinear* task, int64_t* sizes);

LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_linear(const LlmquantCudaLinear* task, void* stream);

/* The inner loop of GPTQ, as in llmquant/solve/columns.py: `round_columns`. At most 128 columns of the transposed
 * weight, one after the other:
 *   v_j = round(w_j / s), e_j = (w_j - s v_j) pivots_j, w_l -= e_j matrix_jl for l > j.
 * With candidates, each group takes, when its first column is reached, the grid on which this loses least: the sum of
 * e_j^2 over the group. */
typedef struct LlmquantCudaColumns {
    float* work;             /* [columns][rows]; replaced by the errors e */
    const float* matrix;     /* [columns][stride]: only what is right of the diagonal is read */
    const float* pivots;     /* [columns] */
    float* scales;           /* [ceil(columns / group)][rows] */
    float* zeros;            /* like scales */
    uint8_t* codes;          /* [columns][rows] */
    const float* candidates; /* [candidate_count][3], as `solve.grid.candidates`; null: the grids are given */
    int64_t candidate_count;
    int64_t rows, columns, stride;
    int64_t group; /* columns that share a grid; with candidates, a multiple of 32 */
    int64_t bits, symmetric;
} LlmquantCudaColumns;

LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_round_columns(const LlmquantCudaColumns* task, void* stream);

LLMQUANT_CUDA_EXPORT int64_t llmquant_cuda_abi(void);

/* What a code says, as one clause. Never null; valid until the library is closed. */
LLMQUANT_CUDA_EXPORT const char* llmquant_cuda_message(int64_t code);
