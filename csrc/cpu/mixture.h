// Which experts the tokens of a step go to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "decode.h"

namespace llmquant {

class Routes {
  public:
    struct Visit {
        int64_t token;
        float weight;  // of what the expert makes of it
    };

    struct Group {
        int64_t expert, first, last;  // visits
    };

    // Raises bad_alloc; nothing below does.
    Routes(int64_t tokens, int64_t experts, int64_t chosen)
        : visits(static_cast<std::size_t>(tokens * chosen)),
          groups(static_cast<std::size_t>(experts)),
          picks(static_cast<std::size_t>(tokens * chosen)),
          starts(static_cast<std::size_t>(experts + 1)) {}

    // By scores [tokens][mixture.count], of which the largest are chosen and, of equal ones, the first.
    void choose(const LlmquantMixture& mixture, const float* scores, int64_t tokens) {
        std::fill(starts.begin(), starts.end(), 0);
        for (int64_t t = 0; t < tokens; ++t)
            pick(mixture, scores + t * mixture.count, picks.data() + t * mixture.chosen);
        for (int64_t i = 0; i < tokens * mixture.chosen; ++i) ++starts[index(picks[index(i)].expert + 1)];
        size = 0;
        for (int64_t e = 0; e < mixture.count; ++e) {
            starts[index(e + 1)] += starts[index(e)];
            if (starts[index(e)] < starts[index(e + 1)])
                groups[index(size++)] = {e, starts[index(e)], starts[index(e + 1)]};
        }
        for (int64_t i = 0; i < tokens * mixture.chosen; ++i) {
            const Pick& own = picks[index(i)];
            visits[index(starts[index(own.expert)]++)] = {i / mixture.chosen, own.weight};
        }
    }

    std::vector<Visit> visits;  // those of an expert together, in the order of the tokens
    std::vector<Group> groups;  // the first `size`: of experts that are visited, in their order
    int64_t size = 0;

  private:
    struct Pick {
        int64_t expert;
        float weight;
    };

    static std::size_t index(int64_t i) { return static_cast<std::size_t>(i); }

    static void pick(const LlmquantMixture& mixture, const float* scores, Pick* picks_of) {
        for (int64_t k = 0; k < mixture.chosen; ++k) {
            int64_t best = -1;
            for (int64_t e = 0; e < mixture.count; ++e)
                if (!taken(picks_of, k, e) && (best < 0 || scores[e] > scores[best])) best = e;
            const float most = scores[k ? picks_of[0].expert : best];
            picks_of[k] = {best, std::exp(scores[best] - most)};
        }
        float sum = 0.0f;
        if (mixture.normalized)
            for (int64_t k = 0; k < mixture.chosen; ++k) sum += picks_of[k].weight;
        else
            for (int64_t e = 0; e < mixture.count; ++e) sum += std::exp(scores[e] - scores[picks_of[0].expert]);
        for (int64_t k = 0; k < mixture.chosen; ++k) picks_of[k].weight /= sum;
    }

    static bool taken(const Pick* picks_of, int64_t count, int64_t expert) {
        for (int64_t k = 0; k < count; ++k)
            if (picks_of[k].expert == expert) return true;
        return false;
    }

    std::vector<Pick> picks;      // of each token
    std::vector<int64_t> starts;  // of each expert's visits
};

}  // namespace llmquant
