// What tests of csrc/torch/cuda_ops.cpp link to it: the functions of torch and CUDA that it is given, answering what tests
// have set; and what stands in front of the emulated library, whose calls are kept, and come in one at a time, as there is
// one emulated device.

#include <cstdint>
#include <mutex>

#include "../../csrc/cuda/llmquant_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t capturing, no_stream, no_capture_state, calls;  // what is to be answered; how often it was called
EXPORT int64_t answer, abi;                                    // 0: the library's own
EXPORT LlmquantCudaLinear last;
EXPORT void* last_stream;

int32_t capturing = 0, no_stream = 0, no_capture_state = 0, calls = 0;
int64_t answer = 0, abi = 0;
LlmquantCudaLinear last = {};
void* last_stream = nullptr;

static thread_local void* stream = nullptr;

EXPORT void use_stream(void* used) { stream = used; }

EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** found) {
    *found = stream;
    return no_stream;
}

EXPORT int32_t cudaStreamIsCapturing(void*, int32_t* status) {
    *status = capturing;
    return no_capture_state;
}

extern "C" int64_t __real_llmquant_cuda_linear(const LlmquantCudaLinear* task, void* stream);
extern "C" int64_t __wrap_llmquant_cuda_linear(const LlmquantCudaLinear* task, void* stream) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    ++calls;
    last = *task;
    last_stream = stream;
    return answer ? answer : __real_llmquant_cuda_linear(task, stream);
}

extern "C" int64_t __real_llmquant_cuda_abi();
extern "C" int64_t __wrap_llmquant_cuda_abi() { return abi ? abi : __real_llmquant_cuda_abi(); }
