// Types in row order opened to bf16 tiles: the floats, and those whose codes come out of a grid. What amx-inl.h multiplies, as open-inl.h's.
//
// 32 columns of a row become float32 by what reads that type anywhere, and are rounded to bf16: 64 bytes, the same 32 columns in the order of A's (amx-inl.h).
// Those of 16 rows, turned by pairs, are a tile of B. float32 has the exponents of bf16, so that no row needs a power of its own.
//
// The bodies over tiles are compiled once for all of these types, which they reach through a RowFormat. F32 is not among them: what is left in F32 in a
// file (routers, mostly) decides more than it costs.
#pragma once

#include "formats_iq-inl.h"
#include "isa/kernels.h"
#include "open-inl.h"

namespace moespan {
namespace {

// How a type opens 16 rows. `state` is what `take` keeps of a span for `open`.
struct RowFormat {
    size_t span_bytes;
    // The span of `count` sub-blocks of each of 16 rows.
    void (*take)(const uint8_t* const* spans, int count, void* state);
    // Its sub-block j to bf16 [16][32].
    void (*open)(const void* state, int j, uint16_t* rows);
};
constexpr size_t kRowState = 4096;  // the most bytes of a state

// scale * code + offset.
template <class Ops, class Format>
struct QuantisedRows {
    static constexpr int kGroups = kSpan / Format::kGroup, kVectors = kSubBlock / Ops::kLanes;
    typename OpenedSpan<Format>::Type spans[kTile];
    float scale[kTile][kGroups], offset[kTile][Format::kOffset ? kGroups : 1];

    static void take(const uint8_t* const* spans, int count, void* state) {
        auto& rows = *(QuantisedRows*)state;
        for (size_t r = 0; r < kTile; ++r) {
            const auto s = Format::scales(spans[r], count);
            for (int v = 0; v < s.kVectors; ++v) {
                Ops::V8::store(rows.scale[r] + 8 * v, s.scale[v]);
                if constexpr (Format::kOffset) Ops::V8::store(rows.offset[r] + 8 * v, s.offset[v]);
            }
            OpenedSpan<Format>::open(spans[r], rows.spans[r]);
        }
    }
    static void open(const void* state, int j, uint16_t* to) {
        const auto& rows = *(const QuantisedRows*)state;
        for (size_t r = 0; r < kTile; ++r, to += kTileColumns) {
            typename Ops::Reg values[kVectors];
            Ops::template floats_of<Format::kSigned>(Format::codes(rows.spans[r], j), values);
            for (int v = 0; v < kVectors; ++v) {
                const int g = (j * kSubBlock + v * Ops::kLanes) / Format::kGroup;
                const auto scale = Ops::broadcast(rows.scale[r][g]);
                values[v] = Format::kOffset ? Ops::fma(values[v], scale, Ops::broadcast(rows.offset[r][Format::kOffset ? g : 0])) : Ops::mul(values[v], scale);
            }
            Ops::round_columns(values, to);
        }
    }
};

template <class Ops, class Format>
struct FloatRows {
    static constexpr int kVectors = kSubBlock / Ops::kLanes;
    const typename Format::Element* spans[kTile];

    static void take(const uint8_t* const* spans, int, void* state) {
        for (size_t r = 0; r < kTile; ++r) ((FloatRows*)state)->spans[r] = (const typename Format::Element*)spans[r];
    }
    static void open(const void* state, int j, uint16_t* to) {
        const auto& rows = *(const FloatRows*)state;
        for (size_t r = 0; r < kTile; ++r, to += kTileColumns) {
            typename Ops::Reg values[kVectors];
            for (int v = 0; v < kVectors; ++v) values[v] = Format::load(rows.spans[r] + j * kSubBlock + v * Ops::kLanes);
            Ops::round_columns(values, to);
        }
    }
};

template <class Ops, class Format>
constexpr RowFormat row_format() {
    if constexpr (requires { typename Format::Block; }) {
        using State = QuantisedRows<Ops, Format>;
        static_assert(sizeof(State) <= kRowState);
        return {sizeof(typename Format::Block) * (kSpan / Format::kBlock), State::take, State::open};
    } else {
        using State = FloatRows<Ops, Format>;
        return {sizeof(typename Format::Element) * kSpan, State::take, State::open};
    }
}

// The place of a Tiles in the bodies over tiles.
template <class Ops>
struct InRows {};

// Strips of 16 rows, at(i) the i-th: its Rows, of which the last may have fewer.
template <class At>
struct RowStrips {
    const At& at;
    const RowFormat& format;
    size_t count, cols;

    size_t subs() const { return cols / kSubBlock; }
    // Where the span at sub-block `sub` of each row lies. Lanes of rows that are not there repeat the last one, and their results are never stored.
    void spans(size_t i, size_t sub, const uint8_t** rows) const {
        const Rows strip = at(i);
        const uint8_t* first = strip.data + sub / kSpanSubs * format.span_bytes;
        for (size_t r = 0; r < kTile; ++r) rows[r] = first + (r < strip.count ? r : strip.count - 1) * strip.row_bytes;
    }
};

// No row needs a power; the activations' leaves the sums.
template <class Ops, class At>
void find_powers(const RowStrips<At>& strips, RowPowers* powers) {
    for (size_t i = 0; i < strips.count; ++i) {
        for (size_t r = 0; r < kTile; ++r) {
            powers[i].weight[r] = 1.0f;
            powers[i].sum[r] = 0x1p-64f;
        }
    }
}
static_assert(kInputPower == 64);

template <class Ops, int W, class Strips>
class Opener<Ops, InRows<Ops>, W, Strips> {
  public:
    Opener(const Strips& strips, const RowPowers*, size_t depth) : strips_(strips), next_(strips.count, strips.subs(), depth) {}

    __attribute__((noinline)) void open(uint16_t* tiles) {
        if (j_ == count_ && !take_span()) return;
        for (size_t b = 0; b < width_; ++b) {
            alignas(64) uint16_t rows[kTileHalves];
            strips_.format.open(states_[b], (int)j_, rows);
            Ops::turn_pairs(rows, tiles + b * kTileHalves);
        }
        ++j_;
    }

  private:
    // The spans after those that are taken are fetched meanwhile.
    bool take_span() {
        if (next_.ended()) return false;
        const Walk<W> at = next_;
        next_.step();
        width_ = at.width();
        count_ = at.count();
        j_ = 0;
        for (size_t b = 0; b < width_; ++b) {
            const uint8_t* spans[kTile];
            if (!next_.ended() && b < next_.width()) {
                strips_.spans(next_.strip() + b, next_.sub(), spans);
                for (const uint8_t* span : spans) {
                    for (size_t byte = 0; byte < strips_.format.span_bytes; byte += kLine) Ops::prefetch_far(span + byte);
                }
            }
            strips_.spans(at.strip() + b, at.sub(), spans);
            strips_.format.take(spans, (int)count_, states_[b]);
        }
        return true;
    }

    const Strips& strips_;
    Walk<W> next_;
    size_t width_ = 0, count_ = 0, j_ = 0;
    alignas(64) uint8_t states_[W][kRowState];
};

}  // namespace
}  // namespace moespan
