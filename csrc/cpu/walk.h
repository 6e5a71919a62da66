// The way of one token, or one of each of several sequences, through all layers, gone by several threads side by side.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <thread>
#include <vector>

#include "decode.h"
#include "mixture.h"

namespace llmquant {

// Where threads wait for each other, five times in a layer, and six in one of experts. OpenMP's own barrier puts a
// thread to sleep at once if there have ever been more threads than processors, of whoever's parallel regions: then
// each wait takes 50 us instead of 1.
class Meeting {
  public:
    void wait(int64_t count) {
        const int64_t now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int left = PATIENCE; round.load(std::memory_order_acquire) == now;)
            left ? --left, pause() : std::this_thread::yield();  // who is awaited may need this processor
    }

  private:
    static constexpr int PATIENCE = 1 << 12;  // pauses, of 10 to 50 ns

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    alignas(64) std::atomic<int64_t> arrived = 0;
    alignas(64) std::atomic<int64_t> round = 0;
};

// Rows of the products are shared between the threads, and heads of the attention. What is little work each thread does
// for itself: that takes less time than to wait for another. A result depends on its own row and token alone, so never
// on the number of threads, nor on the other sequences.
class Walk {
  public:
    // Raises bad_alloc if there is no memory for as many threads as the step asks for.
    Walk(const LlmquantStep& step_, const DecodeKernels& decode_, const LinearKernels& linear_)
        : step(step_),
          decode(decode_),
          linear(linear_),
          state(numbers(step.sequence_count * whole(step.hidden))),
          change(numbers(step.sequence_count * step.hidden)),
          q(numbers(step.sequence_count * step.heads * step.head_width)),
          k(numbers(step.sequence_count * step.kv_heads * step.head_width)),
          v(numbers(step.sequence_count * step.kv_heads * step.head_width)),
          attended(numbers(step.sequence_count * step.heads * step.head_width)) {
        int64_t most = 0, inner = step.ffn, rows = step.ffn, experts = 0, chosen = 0;
        for (int64_t i = 0; i < step.layer_count; ++i) {
            const LlmquantMixture& mixture = step.layers[i].mixture;
            if (!mixture.count) continue;
            inner = std::max(inner, mixture.experts->rows);
            rows = std::max(rows, mixture.chosen * mixture.experts->rows);
            experts = std::max(experts, mixture.count);
            chosen = std::max(chosen, mixture.chosen);
        }
        gate = numbers(step.sequence_count * rows);
        up = numbers(step.sequence_count * rows);
        scores = numbers(step.sequence_count * experts);
        for (int64_t t = 0; t < step.sequence_count; ++t) {
            most = std::max(most, step.sequences[t].before);
            work += step.heads * (step.sequences[t].before + 1);
        }
        const int64_t widest = padded(std::max({step.hidden, inner, step.heads * step.head_width}));
        const int64_t tokens = (step.sequence_count + LLMQUANT_TILE - 1) / LLMQUANT_TILE * LLMQUANT_TILE;
        for (int64_t i = 0; i < step.threads; ++i)
            own.push_back({numbers(step.sequence_count * step.hidden + LLMQUANT_PANEL),
                           numbers(LLMQUANT_HEADS_TOGETHER * (whole(most + 1) + step.head_width) + 2 * step.head_width),
                           std::vector<int8_t>(static_cast<std::size_t>(tokens * 2 * (widest + LLMQUANT_CHUNK))),
                           numbers(tokens * widest / LLMQUANT_CHUNK),
                           std::vector<int32_t>(static_cast<std::size_t>(tokens * widest / LLMQUANT_CHUNK)),
                           numbers(experts ? step.sequence_count * step.hidden + LLMQUANT_PANEL : 0),
                           Routes(step.sequence_count, experts, chosen)});
    }

    // To be called by each of `count` threads at the same time.
    void go(int64_t thread, int64_t count) {
        const Part part = {thread, count, own[static_cast<std::size_t>(thread)]};
        if (thread == 0)
            for (int64_t t = 0; t < step.sequence_count; ++t)
                decode.read(given(t), step.kind, step.hidden, state.data() + t * whole(step.hidden));
        meeting.wait(count);
        for (int64_t i = 0; i < step.layer_count; ++i) {
            const LlmquantLayer& layer = step.layers[i];
            norm(layer.attention_gain, part);
            multiply({{layer.q, q}, {layer.k, k}, {layer.v, v}}, part.own.normed, part);
            meeting.wait(count);
            attend(i, part);
            meeting.wait(count);
            multiply({{layer.out, change}}, attended, part);
            add_change(layer.out, part);
            meeting.wait(count);
            norm(layer.mlp_gain, part);
            if (layer.mixture.count) {
                score(layer.mixture, part);
                meeting.wait(count);
                part.own.routes.choose(layer.mixture, scores.data(), step.sequence_count);
                enter(layer.mixture, part);
                meeting.wait(count);
                leave(layer.mixture, part);
            } else {
                multiply({{layer.gate, gate}, {layer.up, up}}, part.own.normed, part);
                apply_gate(layer.gate, part);
                meeting.wait(count);
                multiply({{layer.down, change}}, gate, part);
                add_change(layer.down, part);
            }
            meeting.wait(count);
        }
        if (thread == 0) {
            norm(step.final_gain, part);
            for (int64_t t = 0; t < step.sequence_count; ++t)
                decode.write(part.own.normed.data() + t * step.hidden, step.kind, step.hidden, given(t));
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
        Vector gathered;  // inputs of an expert
        Routes routes;
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
        int64_t at = 0;  // where the first token's results are
    };

    static int64_t whole(int64_t count) { return (count + LLMQUANT_PANEL - 1) / LLMQUANT_PANEL * LLMQUANT_PANEL; }

    static Vector numbers(int64_t count) { return Vector(static_cast<std::size_t>(whole(count))); }

    void* given(int64_t token) const {
        return static_cast<char*>(step.states) + token * step.hidden * bytes_of(step.kind);
    }

    // The thread's own, of all states. What one of them leaves behind its end, the next one overwrites.
    void norm(const void* gain, const Part& part) const {
        for (int64_t t = 0; t < step.sequence_count; ++t)
            decode.norm(step, state.data() + t * whole(step.hidden), step.hidden, gain,
                        part.own.normed.data() + t * step.hidden);
    }

    // This thread's rows of the linears that share the input x, which it brings to integers as their groups ask for.
    void multiply(std::initializer_list<Product> products, const Vector& x, const Part& part) const {
        multiply(products, x.data(), step.sequence_count, part,
                 [&](int64_t panels) { return share_of_panels(panels, part); });
    }

    // The same of some tokens and of the panels that `share` names.
    template <typename Share>
    void multiply(std::initializer_list<Product> products, const float* x, int64_t tokens, const Part& part,
                  Share share) const {
        const Integers integers = {part.own.planes.data(), part.own.scales.data(), part.own.sums.data()};
        const LlmquantLinear* known = nullptr;
        for (const Product& product : products) {
            LlmquantLinear task = product.weight;
            task.x = x;
            task.y = product.y.data() + product.at;
            task.tokens = tokens;
            task.x_kind = LLMQUANT_FP32;
            if (!known || block_of(*known) != block_of(task) || known->planes != task.planes)
                linear.to_integers(task, integers, 0, task.tokens);
            known = &product.weight;
            const Rows panels = share(panels_of(task));
            linear.multiply(task, integers, panels.first, panels.last);
        }
    }

    static Rows share_of_panels(int64_t panels, const Part& part) {
        return {panels * part.thread / part.count, panels * (part.thread + 1) / part.count};
    }

    // The rows of y that `multiply` gives a thread: whole panels, but for the last.
    static Rows share_of(const LlmquantLinear& weight, const Part& part) {
        return rows_of(weight, share_of_panels(panels_of(weight), part));
    }

    static Rows rows_of(const LlmquantLinear& weight, const Rows& panels) {
        return {panels.first * LLMQUANT_PANEL, std::min(weight.rows, panels.last * LLMQUANT_PANEL)};
    }

    // This thread's rows of the router.
    void score(const LlmquantMixture& mixture, const Part& part) {
        const Rows own = share_of_panels(mixture.count, part);
        for (int64_t t = 0; t < step.sequence_count; ++t)
            decode.score(mixture.router, step.kind, step.hidden, part.own.normed.data() + t * step.hidden, own.first,
                         own.last, scores.data() + t * mixture.count);
    }

    // gate = silu(gate(m)) * up(m) of all visits. Of the panels of all experts that are visited, one after the other,
    // a thread has its part.
    void enter(const LlmquantMixture& mixture, const Part& part) {
        const Routes& routes = part.own.routes;
        const int64_t inner = mixture.experts->rows, panels = panels_of(*mixture.experts);
        const Rows all = share_of_panels(routes.size * panels, part);
        for (int64_t g = all.first / panels; g * panels < all.last; ++g) {
            const Routes::Group& group = routes.groups[static_cast<std::size_t>(g)];
            const LlmquantLinear* expert = mixture.experts + 3 * group.expert;
            const Rows own = {std::max(all.first - g * panels, int64_t{0}), std::min(all.last - g * panels, panels)};
            const int64_t at = group.first * inner;
            multiply({{expert[0], gate, at}, {expert[1], up, at}}, inputs_of(group, part), group.last - group.first,
                     part, [&](int64_t) { return own; });
            const Rows rows = rows_of(expert[0], own);
            for (int64_t i = group.first; i < group.last; ++i)
                decode.gated(gate.data() + i * inner + rows.first, up.data() + i * inner + rows.first,
                             rows.last - rows.first);
        }
    }

    // The normed states of a group's tokens, one after the other.
    const float* inputs_of(const Routes::Group& group, const Part& part) const {
        if (step.sequence_count == 1) return part.own.normed.data();
        float* to = part.own.gathered.data();
        for (int64_t i = group.first; i < group.last; ++i, to += step.hidden)
            std::copy_n(part.own.normed.data() + visit(i, part).token * step.hidden, step.hidden, to);
        return part.own.gathered.data();
    }

    // state += weight * down(gate) of all visits, a token's in the order of the experts: this thread's rows.
    void leave(const LlmquantMixture& mixture, const Part& part) {
        const Routes& routes = part.own.routes;
        const int64_t inner = mixture.experts->rows;
        for (int64_t g = 0; g < routes.size; ++g) {
            const Routes::Group& group = routes.groups[static_cast<std::size_t>(g)];
            const LlmquantLinear& down = mixture.experts[3 * group.expert + 2];
            multiply({{down, change}}, gate.data() + group.first * inner, group.last - group.first, part,
                     [&](int64_t panels) { return share_of_panels(panels, part); });
            const Rows rows = share_of(down, part);
            for (int64_t i = group.first; i < group.last; ++i) {
                const float* from = change.data() + (i - group.first) * step.hidden;
                float* to = state.data() + visit(i, part).token * whole(step.hidden);
                for (int64_t r = rows.first; r < rows.last; ++r) to[r] += visit(i, part).weight * from[r];
            }
        }
    }

    static const Routes::Visit& visit(int64_t i, const Part& part) {
        return part.own.routes.visits[static_cast<std::size_t>(i)];
    }

    // This thread's heads: of all those of all tokens, which it takes one after the other, its part by the keys that
    // they attend to.
    void attend(int64_t layer, const Part& part) {
        const int64_t inner = step.heads * step.head_width, kv = step.kv_heads * step.head_width;
        int64_t done = 0;
        for (int64_t t = 0; t < step.sequence_count; ++t) {
            const int64_t keys = step.sequences[t].before + 1;
            const auto head = [&](int64_t thread) {
                return std::clamp<int64_t>((work * thread / part.count - done + keys - 1) / keys, 0, step.heads);
            };
            decode.attend(step, step.sequences[t], layer,
                          {q.data() + t * inner, k.data() + t * kv, v.data() + t * kv, attended.data() + t * inner},
                          head(part.thread), head(part.thread + 1), part.own.scratch.data());
            done += step.heads * keys;
        }
    }

    void apply_gate(const LlmquantLinear& weight, const Part& part) {
        const Rows rows = share_of(weight, part);
        for (int64_t t = 0; t < step.sequence_count; ++t) {
            const int64_t first = t * step.ffn + rows.first;
            decode.gated(gate.data() + first, up.data() + first, rows.last - rows.first);
        }
    }

    void add_change(const LlmquantLinear& weight, const Part& part) {
        const Rows rows = share_of(weight, part);
        for (int64_t t = 0; t < step.sequence_count; ++t) {
            float* to = state.data() + t * whole(step.hidden);
            const float* from = change.data() + t * step.hidden;
            for (int64_t i = rows.first; i < rows.last; ++i) to[i] += from[i];
        }
    }

    const LlmquantStep& step;
    const DecodeKernels& decode;
    const LinearKernels& linear;
    Vector state, change, q, k, v, attended, gate, up, scores;
    std::vector<Own> own;
    Meeting meeting;
    int64_t work = 0;  // of attention: keys, for each head
};

}  // namespace llmquant
