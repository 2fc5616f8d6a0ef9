// How a step reads and writes the moments of one block, one policy per form. `Held` says where they lie: codes with
// their scale, or floats. A Writer takes the vectors of one piece in order.
#pragma once
#include "optim/cpu/codec8.h"

namespace tilewise {
namespace {

struct Held {
  void* values;
  float* scale;
};

// The rule keeps no such moment.
struct None {
  struct Writer {
    TILEWISE_INLINE Writer(Held, float, int) {}
    TILEWISE_INLINE void put(int, VF) {}
  };
  static constexpr Format kFormat = Format::none;
  static constexpr int kPieces = 1;  // of 128 elements, that share a scale
  static constexpr bool kKept = false, kQuantised = false, kAveraged = false, kGiven = false;
  static Held at(const Moment&, int64_t) { return {}; }
};

struct Full {
  static constexpr Format kFormat = Format::f32;
  static constexpr int kPieces = 1;
  static constexpr bool kKept = true, kQuantised = false, kAveraged = true, kGiven = false;
  static Held at(const Moment& moment, int64_t element) {
    return {static_cast<float*>(moment.values) + element, nullptr};
  }
  TILEWISE_INLINE static void read(Held held, int piece, float factor, BlockValues& x) {
    const float* from = static_cast<float*>(held.values) + piece * kBlock;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) x[i] = load(from + i * W) * set1(factor);
  }
  struct Writer {
    float* to;
    TILEWISE_INLINE Writer(Held held, float, int piece) : to(static_cast<float*>(held.values) + piece * kBlock) {}
    TILEWISE_INLINE void put(int i, VF x) { store(to + i * W, x); }
  };
};

// A second moment that is complete before the step: floats, only read.
struct Given : Full {
  using Writer = None::Writer;
  static constexpr Format kFormat = Format::factored;
  static constexpr bool kAveraged = false, kGiven = true;
  TILEWISE_INLINE static void read(Held held, int piece, float, BlockValues& x) {
    const float* from = static_cast<float*>(held.values) + piece * kBlock;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) x[i] = load(from + i * W);
  }
};

template <class Codec_>
struct Quantised {
  using Codec = Codec_;
  static constexpr Format kFormat = Codec::kBits == 8 ? Format::bits8 : Format::bits4;
  static constexpr int kPieces = Codec::kPieces;
  static constexpr bool kKept = true, kQuantised = true, kAveraged = true, kGiven = false;
  static Held at(const Moment& moment, int64_t element) {
    const int64_t block = element / Codec::kElements;
    return {static_cast<uint8_t*>(moment.values) + block * Codec::kBytes, moment.scales + block};
  }
  TILEWISE_INLINE static uint8_t* codes(Held held, int piece) {
    return static_cast<uint8_t*>(held.values) + piece * Codec::kPieceBytes;
  }
  template <class Encoder>
  struct Writing : Encoder {
    TILEWISE_INLINE Writing(Held held, float scale, int piece) : Encoder(scale, codes(held, piece)) {}
  };
};
template <class Codec>
struct Signed : Quantised<Codec> {
  using Writer = typename Quantised<Codec>::template Writing<typename Codec::SignedEncoder>;
  TILEWISE_INLINE static void read(Held held, int piece, float factor, BlockValues& x) {
    Codec::decode_signed(Signed::codes(held, piece), *held.scale * factor, x);
  }
};
template <class Codec>
struct Unsigned : Quantised<Codec> {
  using Writer = typename Quantised<Codec>::template Writing<typename Codec::UnsignedEncoder>;
  TILEWISE_INLINE static void read(Held held, int piece, float factor, BlockValues& x) {
    Codec::decode_unsigned(Unsigned::codes(held, piece), *held.scale * factor, x);
  }
};

}  // namespace
}  // namespace tilewise
