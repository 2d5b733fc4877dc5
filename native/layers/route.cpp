#include "layers/route.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "layers/spread.h"

namespace moespan {
namespace {

constexpr size_t kSmall = 1024;      // scores that one thread chooses from in about as long as a fork and a join take
constexpr float kNothing = 1e-20f;   // DeepSeek's guard of the normalisation

// The `most` largest of the values that are offered, best first, in the caller's arrays. Among equals the first stays; NaN counts as the smallest.
class Best {
  public:
    Best(size_t most, float* values, int32_t* ids) : most_(most), values_(values), ids_(ids) {}

    void offer(float value, int32_t id) {
        if (count_ == most_ && !(value > values_[count_ - 1])) return;  // what nearly all offers meet
        if (std::isnan(value)) value = -std::numeric_limits<float>::infinity();
        if (count_ < most_) ++count_;
        size_t at = count_ - 1;
        for (; at > 0 && value > values_[at - 1]; --at) {
            values_[at] = values_[at - 1];
            ids_[at] = ids_[at - 1];
        }
        values_[at] = value;
        ids_[at] = id;
    }

  private:
    const size_t most_;
    float* const values_;
    int32_t* const ids_;
    size_t count_ = 0;
};

void softmax(float* logits, size_t count) {
    const float largest = *std::max_element(logits, logits + count);
    float sum = 0.0f;
    for (size_t i = 0; i < count; ++i) sum += logits[i] = std::exp(logits[i] - largest);
    for (size_t i = 0; i < count; ++i) logits[i] /= sum;
}

// The choice for one token, from its scores.
class Choice {
  public:
    Choice(const Routing& routing, const float* scores, size_t experts) : routing_(routing), scores_(scores), group_size_(experts / routing.groups) {}

    // weights is where the biased scores of the best so far stand meanwhile.
    void make(int32_t* ids, float* weights) const {
        bool used[kMaxExpertGroups];
        use_groups(used);
        Best best(routing_.top_k, weights, ids);
        for (size_t group = 0; group < routing_.groups; ++group) {
            if (used[group]) offer_group(group, best);
        }
        weigh(ids, weights);
    }

  private:
    float biased(size_t expert) const { return routing_.bias == nullptr ? scores_[expert] : scores_[expert] + routing_.bias[expert]; }

    void offer_group(size_t group, Best& best) const {
        for (size_t i = group * group_size_; i < (group + 1) * group_size_; ++i) best.offer(biased(i), static_cast<int32_t>(i));
    }

    void use_groups(bool* used) const {
        const bool all = routing_.groups_used == routing_.groups;
        std::fill_n(used, routing_.groups, all);
        if (all) return;
        float worths[kMaxExpertGroups];
        int32_t groups[kMaxExpertGroups];
        Best best(routing_.groups_used, worths, groups);
        for (size_t group = 0; group < routing_.groups; ++group) best.offer(worth(group), static_cast<int32_t>(group));
        for (size_t i = 0; i < routing_.groups_used; ++i) used[groups[i]] = true;
    }

    float worth(size_t group) const {
        float values[kMaxExpertGroups];
        int32_t ids[kMaxExpertGroups];
        Best best(routing_.group_top, values, ids);
        offer_group(group, best);
        float sum = 0.0f;
        for (size_t i = 0; i < routing_.group_top; ++i) sum += values[i];
        return sum;
    }

    void weigh(const int32_t* ids, float* weights) const {
        float sum = 0.0f;
        for (size_t j = 0; j < routing_.top_k; ++j) sum += weights[j] = scores_[ids[j]];
        const float factor = routing_.normalize ? routing_.scale / (sum + kNothing) : routing_.scale;
        for (size_t j = 0; j < routing_.top_k; ++j) weights[j] *= factor;
    }

    const Routing& routing_;
    const float* scores_;
    const size_t group_size_;
};

}  // namespace

void sigmoid(float* values, size_t count) {
    for (size_t i = 0; i < count; ++i) values[i] = 1.0f / (1.0f + std::exp(-values[i]));
}

void route(Pool& pool, const Matrix& router, const Routing& routing, const float* x, size_t n, int32_t* ids, float* weights) {
    const size_t experts = router.rows, k = routing.top_k;
    auto* logits = static_cast<float*>(pool.shared(Shared::kLogits, n * experts * sizeof(float)));
    linear(pool, &router, 1, x, n, &logits, false);
    spread(pool, n, n * experts <= kSmall, [&](size_t token, uint8_t*) {
        float* scores = logits + token * experts;
        if (routing.sigmoid) {
            sigmoid(scores, experts);
        } else {
            softmax(scores, experts);
        }
        Choice(routing, scores, experts).make(ids + token * k, weights + token * k);
    });
}

}  // namespace moespan
