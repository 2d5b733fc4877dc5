#include "layers/ffn.h"

#include <algorithm>

#include "layers/product.h"
#include "layers/spread.h"

namespace moespan {
namespace {

constexpr size_t kPiecesPerThread = 8;   // of gate and up: 8 experts of one token then keep 15 threads busy to within a few percent
constexpr size_t kAlign = 32;            // rows of a piece: what is rounded to int8 together
constexpr size_t kRowCost = 4;           // what reading a row of weights once costs, in products with a token
constexpr size_t kSmallInput = 16384;    // values that one thread rounds in about as long as a fork and a join take

// One call, cut into pieces. Gate and up of a group are cut alike, at multiples of 32 rows, so that the thread that computed a piece of both
// can apply the gate and round the piece to int8 for `down` while it is in its cache. Down is cut by rows of the output alone: a piece is those
// rows of every group, so that no two threads add to the same value, and no sum waits for another.
class Pieces {
  public:
    Pieces(Pool& pool, const ExpertCall& call)
        : call_(call),
          kernels_(pool.kernels()),
          gate_(kernels_, call.gate),
          up_(kernels_, call.up),
          down_(kernels_, call.down),
          input_(pool, Shared::kInput, input_rows(), call.gate.cols, readers(gate_, up_), call.tokens == nullptr ? call.x : nullptr),
          hidden_(pool, Shared::kHidden, call.rows, call.gate.rows, readers(down_)) {
        const auto threads = static_cast<size_t>(pool.threads());
        cut_groups(threads);
        size_t most = 0;
        for (size_t g = 0; g < call.group_count; ++g) most = std::max(most, call.groups[g].count);
        down_cut_ = down_.cut(most, threads);
        pool.reserve_scratch(scratch_bytes(most));
    }

    void run(Pool& pool) const {
        fill_input(pool);
        pool.each(gate_pieces_, [this](size_t piece, uint8_t* scratch) { compute_hidden(piece, scratch); });
        pool.each(down_cut_.count(), [this](size_t piece, uint8_t* scratch) { compute_out(piece, scratch); });
    }

  private:
    // Without a list of tokens, all groups read the same rows.
    size_t input_rows() const { return call_.tokens == nullptr ? call_.groups[0].count : call_.rows; }
    Tokens input_of(const Group& group) const { return input_.rows(call_.tokens == nullptr ? 0 : group.first, group.count); }

    // Pieces of about the same cost, whatever the numbers of tokens.
    void cut_groups(size_t threads) {
        const size_t width = call_.gate.rows;
        size_t cost = 0;
        for (size_t g = 0; g < call_.group_count; ++g) cost += width * (kRowCost + call_.groups[g].count);
        const size_t share = cost / (threads * kPiecesPerThread);
        for (size_t g = 0; g < call_.group_count; ++g) {
            Group& group = call_.groups[g];
            const size_t fair = std::min(share / (kRowCost + group.count), gate_.fitting_rows(group.count));
            group.chunk_rows = std::max(kAlign, std::min(fair, up_.fitting_rows(group.count)) / kAlign * kAlign);
            group.first_piece = gate_pieces_;
            gate_pieces_ += ceil_div(width, group.chunk_rows);
        }
    }

    // Behind the panels, a piece keeps its floats in the scratch: gate's and up's, or down's on their way to their tokens.
    size_t scratch_bytes(size_t most) const {
        size_t bytes = down_.scratch_bytes(most, down_cut_.chunk_rows) + most * down_cut_.chunk_rows * sizeof(float);
        for (size_t g = 0; g < call_.group_count; ++g) {
            const Group& group = call_.groups[g];
            bytes = std::max(bytes, panel_bytes(group) + 2 * group.count * group.chunk_rows * sizeof(float));
        }
        return bytes;
    }
    size_t panel_bytes(const Group& group) const {
        return std::max(gate_.scratch_bytes(group.count, group.chunk_rows), up_.scratch_bytes(group.count, group.chunk_rows));
    }

    void fill_input(Pool& pool) const {
        if (!input_.to_fill()) return;
        const size_t rows = input_rows(), cols = call_.gate.cols;
        spread(pool, rows, rows * cols <= kSmallInput, [&](size_t row, uint8_t*) {
            const size_t token = call_.tokens == nullptr ? row : static_cast<size_t>(call_.tokens[row]);
            input_.put(row, 0, call_.x + token * cols, cols);
        });
    }

    void compute_hidden(size_t piece, uint8_t* scratch) const {
        const Group *begin = call_.groups, *end = begin + call_.group_count;
        const Group& group = *(std::upper_bound(begin, end, piece, [](size_t p, const Group& g) { return p < g.first_piece; }) - 1);
        const size_t first = (piece - group.first_piece) * group.chunk_rows, last = std::min(first + group.chunk_rows, call_.gate.rows);
        const size_t width = last - first;
        auto* gated = reinterpret_cast<float*>(scratch + panel_bytes(group));
        float* upped = gated + group.count * width;
        gate_.compute(group.expert, first, last, input_of(group), {gated, width, false}, scratch, up_.address(group.expert, first));
        up_.compute(group.expert, first, last, input_of(group), {upped, width, false}, scratch);
        for (size_t i = 0; i < group.count; ++i, gated += width, upped += width) {
            kernels_.silu_mul(gated, upped, gated, width);
            if (call_.factors != nullptr) scale(gated, width, call_.factors[group.first + i]);
            hidden_.put(group.first + i, first, gated, width);
        }
    }

    // The rows' factors go here, into the values that down is linear in: its results are then plain sums.
    static void scale(float* values, size_t count, float factor) {
        for (size_t i = 0; i < count; ++i) values[i] *= factor;
    }

    void compute_out(size_t piece, uint8_t* scratch) const {
        const size_t first = down_cut_.begin(piece), last = down_cut_.end(piece), stride = call_.down.rows;
        for (size_t g = 0; g < call_.group_count; ++g) {
            const Group& group = call_.groups[g];
            const Tokens hidden = hidden_.rows(group.first, group.count);
            const uint8_t* next = g + 1 < call_.group_count ? down_.address(call_.groups[g + 1].expert, first) : nullptr;
            if (call_.tokens == nullptr) {
                down_.compute(group.expert, first, last, hidden, {call_.out + first, stride, call_.accumulate || g > 0}, scratch, next);
                continue;
            }
            auto* results = reinterpret_cast<float*>(scratch + down_.scratch_bytes(group.count, last - first));
            down_.compute(group.expert, first, last, hidden, {results, last - first, false}, scratch, next);
            add_to_tokens(results, group, first, last);
        }
    }

    void add_to_tokens(const float* results, const Group& group, size_t first, size_t last) const {
        for (size_t i = 0; i < group.count; ++i, results += last - first) {
            float* out = call_.out + static_cast<size_t>(call_.tokens[group.first + i]) * call_.down.rows + first;
            for (size_t row = 0; row < last - first; ++row) out[row] += results[row];
        }
    }

    const ExpertCall& call_;
    const KernelTable& kernels_;
    const Product gate_, up_, down_;
    const Activations input_, hidden_;
    size_t gate_pieces_ = 0;
    Chunks down_cut_{};
};

}  // namespace

void ffn(Pool& pool, const Matrix& gate, const Matrix& up, const Matrix& down, const float* x, size_t n, const float* scales, float* out, bool accumulate) {
    Group all{0, 0, n, 0, 0};
    ffn_groups(pool, {gate, up, down, x, out, accumulate, &all, 1, n, nullptr, scales});
}

void ffn_groups(Pool& pool, const ExpertCall& call) { Pieces(pool, call).run(pool); }

}  // namespace moespan
