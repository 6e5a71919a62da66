// How the parts of the library meet: what the checked interface of library.cu asks of the kernels.
#pragma once

#include "device.h"
#include "llmquant_cuda.h"

namespace llmquant::cuda {

constexpr int64_t MOST = int64_t{1} << 28;  // rows, columns, tokens: kernels count them in 32 bits

inline bool is_16_bits(int64_t kind) { return kind == LLMQUANT_CUDA_BF16 || kind == LLMQUANT_CUDA_FP16; }
inline bool is_kind(int64_t kind) { return is_16_bits(kind) || kind == LLMQUANT_CUDA_FP32; }
inline bool is_size(int64_t size) { return size > 0 && size <= MOST; }
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t current_device(Device* device);
int64_t check(const LlmquantCudaWeight& weight);

// A packed weight as kernels see it.
struct Weight {
    const Words* codes;
    const Words* scales;  // 8 to a lane / 4
    const uint32_t* zeros;
    Layout layout;
};

inline Weight weight_of(const LlmquantCudaWeight& weight) {
    return {static_cast<const Words*>(weight.codes), static_cast<const Words*>(weight.scales),
            static_cast<const uint32_t*>(weight.zeros), layout_of(weight.rows, weight.columns, weight.group)};
}

// A product as gemv.cu, gemm.cu and wgmma.h see it.
struct Product {
    Weight weight;
    const uint16_t* x;
    const void* bias;
    uint16_t* y;
    Floats* partials;  // of Schedule::blocks * SLOTS tiles
    uint32_t* tickets;
    int64_t x_stride;
    int tokens, bias_kind;
    bool overlap;  // it may have begun before what is before it has ended
    Schedule schedule;
};

// What runs a product: how its work is shared on a device, the bytes of a tile's sums, and the start of it. In a
// schedule of `pairs`, a block stands for two of them, and a tile for one of each.
struct Path {
    Schedule (*schedule)(const Layout& layout, int64_t tokens, const Device& device);
    int64_t (*tile_bytes)(int64_t tokens);
    int64_t (*start)(const Product& product, int64_t kind, void* stream);
    bool pairs = false;
};

extern const Path gemv, cluster, gemm, wgmma, pairs, boxes, split;

int64_t start_pack(const LlmquantCudaWeight& weight, const uint8_t* codes, const float* scales, const uint8_t* zeros,
                   void* stream);
int64_t start_unpack(const LlmquantCudaWeight& weight, uint8_t* codes, float* scales, uint8_t* zeros, void* stream);
int64_t start_dequantize(const LlmquantCudaWeight& weight, int64_t first, int64_t count, int64_t kind, void* out,
                         void* stream);
int64_t start_round_columns(const LlmquantCudaColumns& task, void* stream);

}  // namespace llmquant::cuda
