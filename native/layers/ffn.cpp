#include "layers/ffn.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>

#include "layers/product.h"
#include "layers/spread.h"

namespace moespan {
namespace {

constexpr size_t kPiecesPerThread = 8;   // of gate and up: 8 experts of one token then keep 15 threads busy to within a few percent
constexpr size_t kLastRounds = 3;        // of pieces, at least, are left for each thread: so they get smaller towards the end, down to 1 / kLastParts
constexpr size_t kAlign = 32;            // rows of a piece: what is rounded to int8 together
constexpr size_t kSmallInput = 16384;    // values that one thread rounds in about as long as a fork and a join take

// How a group's gate and up are cut.
struct GroupCut {
    size_t chunk_rows, first_piece;
};

Shared of_node(Shared slot, size_t node) { return static_cast<Shared>(static_cast<size_t>(slot) + node); }

// One part of the experts, cut into pieces. Gate and up of a group are cut alike, at multiples of 32 rows, so that the thread that computed a piece
// of both can apply the gate and round the piece to int8 for `down` while it is in its cache. Down is cut by rows of the output alone: a piece is those
// rows of every group, so that no two threads add to the same value, and no sum waits for another.
class Pieces {
  public:
    // `cuts` has room for every group. What gate and up give goes to the hidden buffer of `node`.
    Pieces(Pool& pool, const ExpertCall& call, const Gated& part, size_t node, GroupCut* cuts)
        : call_(call),
          kernels_(pool.kernels()),
          gate_(kernels_, part.gate),
          up_(kernels_, part.up),
          down_(kernels_, part.down),
          hidden_(pool, of_node(Shared::kHidden, node), call.rows, call.group_count, part.gate.rows, hidden_readers()),
          cuts_(cuts) {}

    // Who reads the input of a group of so many rows, and of all groups.
    Readers input_readers(size_t count) const { return gate_.reads(count) | up_.reads(count); }
    Readers input_readers() const {
        Readers all;
        for (size_t g = 0; g < call_.group_count; ++g) all = all | input_readers(call_.groups[g].count);
        return all;
    }
    size_t width() const { return gate_.matrix().rows; }
    size_t gate_pieces() const { return gate_pieces_; }
    size_t most() const {
        size_t most = 0;
        for (size_t g = 0; g < call_.group_count; ++g) most = std::max(most, call_.groups[g].count);
        return most;
    }
    // Of an empty slice nothing is to be read, and any cut will do.
    Chunks cut_down(size_t threads) const {
        return width() > 0 ? down_.cut(most(), threads) : Chunks::even(down_.matrix().rows, down_.matrix().rows);
    }

    // Pieces of about the same cost, whatever the numbers of tokens; but towards the end of what is streamed of less, so that whoever finds none left has not
    // long to wait.
    void cut_groups(size_t threads) {
        threads_ = threads;
        const bool streamed = gate_.streams(most());
        size_t cost = 0;
        const auto row_cost = [this](size_t count) { return gate_.row_cost(count) + up_.row_cost(count); };
        for (size_t g = 0; g < call_.group_count; ++g) cost += width() * row_cost(call_.groups[g].count);
        const size_t share = cost / (threads * kPiecesPerThread);
        for (size_t g = 0, left = cost; g < call_.group_count; left -= width() * row_cost(call_.groups[g++].count)) {
            const size_t count = call_.groups[g].count;
            const size_t piece = streamed ? std::clamp(left / (threads * kLastRounds), share / kLastParts, share) : share;
            const size_t fair = std::min(piece / row_cost(count), gate_.fitting_rows(gate_.gates(up_, count) ? 2 * count : count));
            cuts_[g].chunk_rows = std::max(kAlign, std::min(fair, up_.fitting_rows(count)) / kAlign * kAlign);
            cuts_[g].first_piece = gate_pieces_;
            gate_pieces_ += ceil_div(width(), cuts_[g].chunk_rows);
        }
    }

    // Behind the panels, a piece keeps gate's and up's floats in the scratch.
    size_t scratch_bytes(size_t down_rows) const {
        size_t bytes = down_.scratch_bytes(most(), down_rows);
        for (size_t g = 0; g < call_.group_count; ++g) {
            bytes = std::max(bytes, panel_bytes(g) + 2 * call_.groups[g].count * cuts_[g].chunk_rows * sizeof(float));
        }
        return bytes;
    }

    void compute_hidden(const Activations& input, size_t piece, const Seat& seat) const {
        const size_t g = group_of(piece);
        const Group& group = call_.groups[g];
        const size_t first = (piece - cuts_[g].first_piece) * cuts_[g].chunk_rows, last = std::min(first + cuts_[g].chunk_rows, width());
        const Tokens tokens = input.rows(call_.tokens == nullptr ? Run{0, group.count, 0} : run_of(g));
        uint8_t* scratch = seat.scratch;
        auto* gated = reinterpret_cast<float*>(scratch + panel_bytes(g));
        if (gate_.gates(up_, group.count)) {
            gate_.compute_gated(up_, group.expert, first, last, tokens, gated, scratch);
            return put_hidden(g, first, last - first, gated);
        }
        float* upped = gated + group.count * (last - first);
        gate_.compute(group.expert, first, last, tokens, {gated, last - first, false}, scratch, up_.address(group.expert, first));
        up_.compute(group.expert, first, last, tokens, {upped, last - first, false}, scratch, piece_address(seat.next));
        kernels_.silu_mul(gated, upped, gated, group.count * (last - first));
        put_hidden(g, first, last - first, gated);
    }

    // Rows first .. last - 1 of `down` to out [n, hidden]; behind them the thread is going to ask for those from `next` on.
    void compute_out(size_t first, size_t last, size_t next, float* out, bool accumulate, uint8_t* scratch) const {
        const size_t stride = down_.matrix().rows;
        if (!accumulate && (call_.tokens != nullptr || width() == 0)) clear(out, first, last);
        if (width() == 0) return;
        for (size_t g = 0; g < call_.group_count; ++g) {
            const Group& group = call_.groups[g];
            const Tokens hidden = hidden_.rows(run_of(g));
            const uint8_t* after = g + 1 < call_.group_count ? down_.address(call_.groups[g + 1].expert, first) : down_address(next);
            // The rows of a group follow its tokens; one group after the other adds to them, and no other piece has these rows of the output.
            const int32_t* tokens = call_.tokens == nullptr ? nullptr : call_.tokens + group.first;
            down_.compute(group.expert, first, last, hidden, {out + first, stride, accumulate || tokens != nullptr || g > 0, tokens}, scratch, after);
        }
    }

  private:
    size_t group_of(size_t piece) const {
        const auto later = std::upper_bound(cuts_, cuts_ + call_.group_count, piece, [](size_t p, const GroupCut& c) { return p < c.first_piece; });
        return static_cast<size_t>(later - cuts_) - 1;
    }

    // Where a piece begins; behind gate and up comes down.
    const uint8_t* piece_address(size_t piece) const {
        if (piece >= gate_pieces_) return down_address(cut_down(threads_).begin(piece - gate_pieces_));
        const size_t g = group_of(piece);
        return gate_.address(call_.groups[g].expert, (piece - cuts_[g].first_piece) * cuts_[g].chunk_rows);
    }
    const uint8_t* down_address(size_t row) const { return row < down_.matrix().rows ? down_.address(call_.groups[0].expert, row) : nullptr; }

    Run run_of(size_t g) const { return {call_.groups[g].first, call_.groups[g].count, g}; }
    Readers hidden_readers() const {
        Readers all;
        for (size_t g = 0; g < call_.group_count; ++g) all = all | down_.reads(call_.groups[g].count);
        return all;
    }
    size_t panel_bytes(size_t g) const {
        const size_t count = call_.groups[g].count, rows = cuts_[g].chunk_rows;
        if (gate_.gates(up_, count)) return gate_.scratch_bytes(count, 2 * rows);
        return std::max(gate_.scratch_bytes(count, rows), up_.scratch_bytes(count, rows));
    }

    // The rows' factors go here, into the values that down is linear in: its results are then plain sums.
    void put_hidden(size_t g, size_t first, size_t width, float* gated) const {
        const Group& group = call_.groups[g];
        const Readers readers = down_.reads(group.count);
        for (size_t i = 0; i < group.count; ++i, gated += width) {
            if (call_.factors != nullptr) scale(gated, width, call_.factors[group.first + i]);
            hidden_.put(run_of(g), i, first, gated, width, readers);
        }
    }
    static void scale(float* values, size_t count, float factor) {
        for (size_t i = 0; i < count; ++i) values[i] *= factor;
    }

    void clear(float* out, size_t first, size_t last) const {
        for (size_t token = 0; token < call_.n; ++token) std::fill(out + token * down_.matrix().rows + first, out + token * down_.matrix().rows + last, 0.0f);
    }
    const ExpertCall& call_;
    const KernelTable& kernels_;
    const Product gate_, up_, down_;
    const Activations hidden_;
    GroupCut* const cuts_;
    size_t gate_pieces_ = 0, threads_ = 0;
};

// What the slices of the nodes add to the output: a sum for each, [n, hidden], and for each piece of the output's rows how many of them are there. Who
// brings the last one adds them up, in the nodes' order. So nobody waits, and the result does not depend on who it was.
class NodeSums {
  public:
    // One of no slices does nothing.
    NodeSums(Pool& pool, const ExpertCall& call, size_t hidden, size_t pieces, size_t slices) : call_(call), hidden_(hidden), slices_(slices) {
        if (slices == 0) return;
        void* memory = pool.shared(Shared::kNodeSums, slices * call.n * hidden * sizeof(float) + pieces * sizeof(uint32_t) + 2 * 64);
        size_t at = 0;
        sums_ = take<float>(at, memory, slices * call.n * hidden);
        there_ = take<uint32_t>(at, memory, pieces);
        std::fill_n(there_, pieces, 0);
    }

    float* of(size_t slice) const { return sums_ + slice * call_.n * hidden_; }

    // A slice's part of the piece is there.
    void arrive(size_t piece, size_t first, size_t last) const {
        // Releases this part to who adds it, who acquires all others.
        if (std::atomic_ref(there_[piece]).fetch_add(1, std::memory_order_acq_rel) + 1 < slices_) return;
        for (size_t token = 0; token < call_.n; ++token) add_up(token * hidden_ + first, token * hidden_ + last);
    }

  private:
    void add_up(size_t first, size_t last) const {
        float* sum = of(0);
        for (size_t slice = 1; slice < slices_; ++slice) {
            const float* more = of(slice);
            for (size_t i = first; i < last; ++i) sum[i] += more[i];
        }
        float* out = call_.out;
        for (size_t i = first; i < last; ++i) out[i] = call_.accumulate ? out[i] + sum[i] : sum[i];
    }

    const ExpertCall& call_;
    const size_t hidden_, slices_;
    float* sums_ = nullptr;
    uint32_t* there_ = nullptr;
};

// One call: gate and up of all groups, then down.
//
//   one part    every thread takes any piece
//   copies      likewise, and reads its own node's; they are cut alike, and what they compute goes to the same buffers
//   slices      each node's threads take the pieces of their own slice, and what that adds to the output goes through NodeSums
class Call {
  public:
    Call(Pool& pool, const ExpertCall& call) : pool_(pool), call_(call), sliced_(call.experts.count > 1 && !call.experts.copies) {
        make_parts();
        const Gated& one = call.experts.parts[0];
        const float* values = call.tokens == nullptr ? call.x : nullptr;
        input_.emplace(pool, Shared::kInput, input_rows(), input_runs(), one.gate.cols, parts_[0]->input_readers(), values);
        down_cut_ = parts_[0]->cut_down(threads_of(0));
        for (size_t i = 1; i < part_count(); ++i) {
            const Chunks cut = parts_[i]->cut_down(threads_of(i));
            if (cut.count() > down_cut_.count()) down_cut_ = cut;
        }
        size_t scratch = 0;
        for (size_t i = 0; i < part_count(); ++i) scratch = std::max(scratch, parts_[i]->scratch_bytes(down_cut_.chunk_rows));
        pool.reserve_scratch(scratch);
        sums_.emplace(pool, call, down_cut_.rows, down_cut_.count(), sliced_ ? part_count() : 0);
    }

    void run() const {
        fill_input();
        run_gate();
        run_down();
    }

  private:
    size_t part_count() const { return call_.experts.count; }
    size_t threads_of(size_t part) const { return sliced_ ? pool_.threads_of(part) : static_cast<size_t>(pool_.threads()); }

    void make_parts() {
        const size_t groups = call_.group_count;
        auto* cuts = static_cast<GroupCut*>(pool_.shared(Shared::kCuts, part_count() * groups * sizeof(GroupCut)));
        for (size_t i = 0; i < part_count(); ++i) {
            parts_[i].emplace(pool_, call_, call_.experts.parts[i], sliced_ ? i : 0, cuts + i * groups);
            parts_[i]->cut_groups(threads_of(i));
        }
    }

    // Without a list of tokens, all groups read the same rows.
    size_t input_rows() const { return call_.tokens == nullptr ? call_.n : call_.rows; }
    size_t input_runs() const { return call_.tokens == nullptr ? 1 : call_.group_count; }
    // The run of a row of the input.
    Run input_run(size_t row) const {
        if (call_.tokens == nullptr) return {0, call_.n, 0};
        const Group *groups = call_.groups, *end = groups + call_.group_count;
        const Group* group = std::upper_bound(groups, end, row, [](size_t r, const Group& g) { return r < g.first; }) - 1;
        return {group->first, group->count, static_cast<size_t>(group - groups)};
    }

    void fill_input() const {
        if (!input_->to_fill()) return;
        const size_t rows = input_rows(), cols = call_.experts.parts[0].gate.cols;
        spread(pool_, rows, rows * cols <= kSmallInput, [&](size_t row, uint8_t*) {
            const size_t token = call_.tokens == nullptr ? row : static_cast<size_t>(call_.tokens[row]);
            const Run run = input_run(row);
            input_->put(run, row - run.first, 0, call_.x + token * cols, cols, parts_[0]->input_readers(run.count));
        });
    }

    void run_gate() const {
        const auto compute = [this](size_t piece, const Seat& seat) { part_at(seat).compute_hidden(*input_, piece, seat); };
        if (!sliced_) return pool_.each_seated(parts_[0]->gate_pieces(), compute);
        std::array<size_t, kMaxNodes> counts{};
        for (size_t i = 0; i < part_count(); ++i) counts[i] = parts_[i]->gate_pieces();
        pool_.each_at_home(counts.data(), compute);
    }

    void run_down() const {
        const auto compute = [this](size_t piece, const Seat& seat, float* out, bool accumulate) {
            const size_t first = down_cut_.begin(piece), last = down_cut_.end(piece);
            part_at(seat).compute_out(first, last, down_cut_.begin(seat.next), out, accumulate, seat.scratch);
        };
        if (!sliced_) {
            return pool_.each_seated(down_cut_.count(), [&](size_t piece, const Seat& seat) { compute(piece, seat, call_.out, call_.accumulate); });
        }
        std::array<size_t, kMaxNodes> counts;
        counts.fill(down_cut_.count());
        pool_.each_at_home(counts.data(), [&](size_t piece, const Seat& seat) {
            compute(piece, seat, sums_->of(seat.node), false);
            sums_->arrive(piece, down_cut_.begin(piece), down_cut_.end(piece));
        });
    }

    const Pieces& part_at(const Seat& seat) const { return *parts_[part_count() == 1 ? 0 : seat.node]; }

    Pool& pool_;
    const ExpertCall& call_;
    const bool sliced_;
    std::array<std::optional<Pieces>, kMaxNodes> parts_;
    std::optional<Activations> input_;
    std::optional<NodeSums> sums_;
    Chunks down_cut_{};
};

}  // namespace

void ffn(Pool& pool, const Matrix& gate, const Matrix& up, const Matrix& down, const float* x, size_t n, const float* scales, float* out, bool accumulate) {
    const Gated one{gate, up, down};
    const Group all{0, 0, n};
    pool.count_read(Weights::kDense, gate.bytes() + up.bytes() + down.bytes());
    ffn_groups(pool, {{&one}, x, n, out, accumulate, &all, 1, n, nullptr, scales});
}

void ffn_groups(Pool& pool, const ExpertCall& call) { Call(pool, call).run(); }

}  // namespace moespan
