// The weight formats, each one small struct over an Ops type: what a kernel must know to read it.
//
// A row is read in spans of 256 values = 8 sub-blocks of 32: one super-block of a K-quant, or 8 blocks of a simple format (the last span
// of a row may be shorter then). A quantised format says
//   codes(span, j)             the 32 codes of sub-block j
//   scales(span, count)        scale and offset of each group: value = scale * code + offset
//   dot(span, j, x)            optional: the products of sub-block j with 32 codes, when there is a cheaper way than through codes()
//   dot_two(span, j, x)        optional: the products of sub-blocks j and j + 1 in one, when that is cheaper
// with a group of kGroup = 32 or 16 values. `count` is the number of sub-blocks that are there; the lanes of the others are 0.
// Codes are unsigned up to kMaxCode, or signed up to that magnitude. A format whose codes must be dug out of several fields does it for a
// span at once: with a type Opened and open(span, opened), `opened` takes the place of `span` in codes and dot.
// Here: the types with blocks of 32, and the floats. formats_k-inl.h has the K-quants, formats_iq-inl.h the IQ types.
// To add a format: its block in quant/blocks.h, a struct here, a line in table-inl.h.
#pragma once

#include "quant/blocks.h"
#include "quant/grids.h"

namespace moespan {
namespace {

constexpr int kSubBlock = 32, kSpanSubs = 8, kSpan = kSubBlock * kSpanSubs;

// Scales and offsets of a span's groups: vector 0 has the 8 of a span with kGroup = 32, or the first 8 of the 16 with kGroup = 16.
template <class Ops, int kGroup>
struct Scales {
    static constexpr int kVectors = kSubBlock / kGroup;
    typename Ops::V8::Reg scale[kVectors], offset[kVectors];
};

// The first two halves of each of `count` consecutive blocks of `block_bytes`; a partial span may end where the file does.
template <class Ops, size_t block_bytes>
inline typename Ops::HalfPairs block_halves(const uint8_t* span, int count) {
    if (count == kSpanSubs) return Ops::template gather_halves<block_bytes>(span, kSpanSubs);
    return Ops::template gather_halves<block_bytes>(span, count);
}

inline uint32_t load_word(const void* p) {
    uint32_t word;
    memcpy(&word, p, sizeof(word));
    return word;
}

// The 8 bytes as floats.
template <class Ops>
inline typename Ops::V8::Reg from_bytes(uint64_t bytes) {
    return Ops::from_u8((const uint8_t*)&bytes);
}

// What Format::codes reads: the span, or what the format makes of it.
template <class Format>
struct OpenedSpan {
    using Type = const uint8_t*;
    static void open(const uint8_t* span, Type& opened) { opened = span; }
};

template <class Format>
    requires requires { typename Format::Opened; }
struct OpenedSpan<Format> {
    using Type = typename Format::Opened;
    static void open(const uint8_t* span, Type& opened) {
        Format::open(span, opened);
        // What vectors wrote is read as single numbers: from memory, which is cheaper than taking them out of registers as compilers would.
        __asm__("" : "+m"(opened));
    }
};

template <class Ops>
struct Q4_0 {
    using Block = BlockQ4_0;
    static constexpr uint32_t kType = kQ4_0;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 15;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::nibbles(((const Block*)span)[j].qs); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_nibbles(((const Block*)span)[j].qs, ((const Block*)span)[j + 1].qs, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto d = block_halves<Ops, sizeof(Block)>(span, count).first;
        return {{d}, {Ops::V8::mul(d, Ops::V8::broadcast(-8.0f))}};
    }
};

template <class Ops>
struct Q4_1 {
    using Block = BlockQ4_1;
    static constexpr uint32_t kType = kQ4_1;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 15;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::nibbles(((const Block*)span)[j].qs); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_nibbles(((const Block*)span)[j].qs, ((const Block*)span)[j + 1].qs, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto [d, m] = block_halves<Ops, sizeof(Block)>(span, count);
        return {{d}, {m}};
    }
};

template <class Ops>
struct Q5_0 {
    using Block = BlockQ5_0;
    static constexpr uint32_t kType = kQ5_0;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 31;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::five_bits(((const Block*)span)[j].q); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_five_bits(((const Block*)span)[j].q, ((const Block*)span)[j + 1].q, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto d = block_halves<Ops, sizeof(Block)>(span, count).first;
        return {{d}, {Ops::V8::mul(d, Ops::V8::broadcast(-16.0f))}};
    }
};

template <class Ops>
struct Q5_1 {
    using Block = BlockQ5_1;
    static constexpr uint32_t kType = kQ5_1;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 31;
    static constexpr bool kSigned = false, kOffset = true;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::five_bits(((const Block*)span)[j].q); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_five_bits(((const Block*)span)[j].q, ((const Block*)span)[j + 1].q, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        const auto [d, m] = block_halves<Ops, sizeof(Block)>(span, count);
        return {{d}, {m}};
    }
};

template <class Ops>
struct Q8_0 {
    using Block = BlockQ8_0;
    static constexpr uint32_t kType = kQ8_0;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 128;
    static constexpr bool kSigned = true, kOffset = false;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::load_codes(((const Block*)span)[j].qs); }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        return {{block_halves<Ops, sizeof(Block)>(span, count).first}, {Ops::V8::zero()}};
    }
};

// d * values[nibble] for a block of 32.
template <class Ops>
struct IQ4_NL {
    using Block = BlockIQ4_NL;
    static constexpr uint32_t kType = kIQ4_NL;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 127;
    static constexpr bool kSigned = true, kOffset = false;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::lookup(Ops::nibbles(((const Block*)span)[j].qs), kValuesIQ4.entries); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_values(((const Block*)span)[j].qs, ((const Block*)span)[j + 1].qs, kValuesIQ4.entries, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        return {{block_halves<Ops, sizeof(Block)>(span, count).first}, {Ops::V8::zero()}};
    }
};

template <class Ops>
struct MXFP4 {
    using Block = BlockMXFP4;
    static constexpr uint32_t kType = kMXFP4;
    static constexpr int kBlock = 32, kGroup = 32, kMaxCode = 12;
    static constexpr bool kSigned = true, kOffset = false;

    static typename Ops::Codes codes(const uint8_t* span, int j) { return Ops::lookup(Ops::nibbles(((const Block*)span)[j].qs), kValuesMXFP4.entries); }
    static typename Ops::Sums dot_two(const uint8_t* span, int j, const int8_t* x) {
        return Ops::dot_two_values(((const Block*)span)[j].qs, ((const Block*)span)[j + 1].qs, kValuesMXFP4.entries, x);
    }
    static Scales<Ops, kGroup> scales(const uint8_t* span, int count) {
        constexpr size_t kBytes = sizeof(Block);
        const auto d = count == kSpanSubs ? Ops::template gather_powers<kBytes>(span, kSpanSubs) : Ops::template gather_powers<kBytes>(span, count);
        return {{d}, {Ops::V8::zero()}};
    }
};

// A float format says how to load a vector of its elements as floats.
template <class Ops>
struct F32 {
    using Element = float;
    static constexpr uint32_t kType = kF32;
    static typename Ops::Reg load(const Element* p) { return Ops::load(p); }
};

template <class Ops>
struct F16 {
    using Element = uint16_t;
    static constexpr uint32_t kType = kF16;
    static typename Ops::Reg load(const Element* p) { return Ops::load_half(p); }
};

template <class Ops>
struct BF16 {
    using Element = uint16_t;
    static constexpr uint32_t kType = kBF16;
    static typename Ops::Reg load(const Element* p) { return Ops::load_bf16(p); }
};

}  // namespace
}  // namespace moespan
