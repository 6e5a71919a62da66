// A token's way through all layers, gone by several threads side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "decode.h"

namespace llmquant {

// Rows of the products are shared between the threads, and heads of the attention. What is little work each thread does
// for itself: that takes less time than to wait for another. A result depends on its own row alone, so never on the
// number of threads.
class Walk {
  public:
    // Raises bad_alloc if there is no memory for as many threads as the step asks for.
    Walk(const LlmquantStep& step_, const DecodeKernels& decode_, const LinearKernels& linear_)
        : step(step_),
          decode(decode_),
          linear(linear_),
          state(numbers(step.hidden)),
          change(numbers(step.hidden)),
          q(numbers(step.heads * step.head_width)),
          k(numbers(step.kv_heads * step.head_width)),
          v(numbers(step.kv_heads * step.head_width)),
          attended(numbers(step.heads * step.head_width)),
          gate(numbers(step.ffn)),
          up(numbers(step.ffn)) {
        const int64_t widest = padded(std::max({step.hidden, step.ffn, step.heads * step.head_width}));
        for (int64_t i = 0; i < step.threads; ++i)
            own.push_back({numbers(step.hidden), numbers(step.before + 1 + 3 * step.head_width + LLMQUANT_PANEL),
                           std::vector<int8_t>(static_cast<std::size_t>(2 * widest)), numbers(widest / LLMQUANT_CHUNK),
                           std::vector<int32_t>(static_cast<std::size_t>(widest / LLMQUANT_CHUNK))});
    }

    // To be called by each of `count` threads at the same time.
    void go(int64_t thread, int64_t count) {
        const Part part = {thread, count, own[static_cast<std::size_t>(thread)]};
        if (thread == 0) decode.read(step.state, step.kind, step.hidden, state.data());
        wait();
        for (int64_t i = 0; i < step.layer_count; ++i) {
            const LlmquantLayer& layer = step.layers[i];
            decode.norm(step, state.data(), layer.attention_gain, part.own.normed.data());
            multiply({{layer.q, q}, {layer.k, k}, {layer.v, v}}, part.own.normed, part);
            wait();
            decode.attend(step, layer, {q.data(), k.data(), v.data(), attended.data()}, step.heads * thread / count,
                          step.heads * (thread + 1) / count, part.own.scratch.data());
            wait();
            multiply({{layer.out, change}}, attended, part);
            add_change(layer.out, part);
            wait();
            decode.norm(step, state.data(), layer.mlp_gain, part.own.normed.data());
            multiply({{layer.gate, gate}, {layer.up, up}}, part.own.normed, part);
            const Rows rows = share_of(layer.gate, part);
            decode.gated(gate.data() + rows.first, up.data() + rows.first, rows.last - rows.first);
            wait();
            multiply({{layer.down, change}}, gate, part);
            add_change(layer.down, part);
            wait();
        }
        if (thread == 0) {
            decode.norm(step, state.data(), step.final_gain, part.own.normed.data());
            decode.write(part.own.normed.data(), step.kind, step.hidden, step.state);
        }
    }

  private:
    using Vector = std::vector<float>;

    // Of each thread.
    struct Own {
        Vector normed, scratch;
        std::vector<int8_t> planes;
        Vector scales;
        std::vector<int32_t> sums;
    };

    struct Part {
        int64_t thread, count;
        Own& own;
    };

    struct Rows {
        int64_t first, last;
    };

    struct Product {
        const LlmquantLinear& weight;
        Vector& y;
    };

    static Vector numbers(int64_t count) {
        return Vector(static_cast<std::size_t>((count + LLMQUANT_PANEL - 1) / LLMQUANT_PANEL * LLMQUANT_PANEL));
    }

    static void wait() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }

    // This thread's rows of the linears that share the input x, which it brings to integers as their groups ask for.
    void multiply(std::initializer_list<Product> products, const Vector& x, const Part& part) const {
        const Integers integers = {part.own.planes.data(), part.own.scales.data(), part.own.sums.data()};
        const LlmquantLinear* known = nullptr;
        for (const Product& product : products) {
            LlmquantLinear task = product.weight;
            task.x = x.data();
            task.y = product.y.data();
            task.tokens = 1;
            task.x_kind = LLMQUANT_FP32;
            if (!known || block_of(*known) != block_of(task) || known->planes != task.planes)
                linear.to_integers(task, integers, 0, 1);
            known = &product.weight;
            const int64_t panels = panels_of(task);
            linear.multiply(task, integers, panels * part.thread / part.count, panels * (part.thread + 1) / part.count);
        }
    }

    // The rows of y that `multiply` gives a thread, in whole panels.
    static Rows share_of(const LlmquantLinear& weight, const Part& part) {
        const int64_t panels = panels_of(weight);
        return {panels * part.thread / part.count * LLMQUANT_PANEL,
                panels * (part.thread + 1) / part.count * LLMQUANT_PANEL};
    }

    void add_change(const LlmquantLinear& weight, const Part& part) {
        const Rows rows = share_of(weight, part);
        for (auto i = static_cast<std::size_t>(rows.first); i < static_cast<std::size_t>(rows.last); ++i)
            state[i] += change[i];
    }

    const LlmquantStep& step;
    const DecodeKernels& decode;
    const LinearKernels& linear;
    Vector state, change, q, k, v, attended, gate, up;
    std::vector<Own> own;
};

}  // namespace llmquant
