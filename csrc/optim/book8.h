// The 8-bit code books: dynamic exponent, as bitsandbytes has them, with codes in the order of their values. Plain C++.
//
// A code has an ordinal n, that of its magnitude: |code - 127| where signed (128, which is 1, lacks its negative), code
// + 1 where unsigned. F ordinals from F = 2^(i + b) on, b = 0 where signed and 1 where unsigned, divide decade i = 0..6
// evenly: their values are the middles of F equal parts of [0.1, 1] 10^(i-6),
//   value(n) = (18 n + 9 - 16 F) u,  u = 5^(i-7) 2^(-8-b).
// Below is zero (ordinal b), above is 1. These decimals are the book; published tables are their float32 roundings, to
// an ulp or two.
//
// Midpoints, in units of 2u: 9 n + 9 - 8 F between n and n + 1 of one decade, 10 F + 9 between its last and the next
// decade, 10 F - 9/4 between the last of all and 1. They are small numbers while u is no float, so decisions are
// made on the other side: with c = 5^(7-i) / 8, exact, x lies above the midpoint M of a block with this scale exactly
// when c x > M scale 2^(-10-b) in the reals.
#pragma once

namespace tilewise::optim {

// The eight classes of magnitudes: d = 0 around zero, d = i + 1 decade i.
struct SearchEntry {
  float factor;  // c
  float offset;  // of 9 n in an inner midpoint
  float last;    // ordinal of the last value, + kRoundBias
  float border;  // midpoint between that and the next class
};
// The eight octaves of ordinals + 1/2, by their exponents modulo 8; the top one has zero too, for which the numerator
// 18 (n + 1/2) + offset is negative.
struct ValueEntry {
  float offset;  // -16 F
  float unit;    // u
};

// 1.5 * 2^23: added to a float, it leaves the nearest integer in the low bits.
constexpr float kRoundBias = 12582912.f;
constexpr int kRoundBiasBits = 0x4b400000;

// The class of y = magnitude / scale is floor((log2 y - edge) / width) + 8. Its borders need only lie somewhere between
// the midpoints before and after the first value of a decade, so the logarithm is read off the bits of the float:
// exponent and mantissa, with an error up to 0.086. `least` is added to y to keep the logarithm above class -1, and y
// is cut off at kMostY, below which class 7 ends.
struct Classes {
  double edge, width;
  float least;
};
constexpr Classes kSignedClasses = {-.28, 3.05, 4e-8f}, kUnsignedClasses = {-.198, 3.174, 2.2e-8f};
constexpr float kMostY = .85f;

struct Book8 {
  SearchEntry search[8];
  ValueEntry value[8];
  float scale_factor;   // 2^(-10-b)
  float least, most;    // of y, all in units of scale_factor
  double width, start;  // class = (bits / 2^23 - start) / width
  int zero_code, zero_ordinal;
};

constexpr Book8 make_book8(bool is_signed) {
  const int b = is_signed ? 0 : 1;
  const Classes classes = is_signed ? kSignedClasses : kUnsignedClasses;
  Book8 book = {};
  double five = 78125;  // 5^(7-i)
  for (int i = 0; i < 7; i++, five /= 5) {
    const float f = static_cast<float>(1 << (i + b));
    book.search[i + 1] = {static_cast<float>(five / 8), 9 - 8 * f, 2 * f - 1 + kRoundBias,
                          i == 6 ? 10 * f - 2.25f : 10 * f + 9};
    // The exponent of n + 1/2 is i + b, and 127 = 7 modulo 8.
    book.value[(i + b + 7) % 8] = {-16 * f, static_cast<float>(1 / five / (256 << b))};
  }
  // Around zero the one ordinal is b, and the midpoint half the first value.
  book.search[0] = {78125.f / 8, -9.f * b, b + kRoundBias, is_signed ? 11.f / 4 : 13.f / 4};
  book.value[is_signed ? 6 : 7] = {1 - 18 * ((128 << b) + .5f), 1};
  book.scale_factor = is_signed ? 0x1p-10f : 0x1p-11f;
  book.least = classes.least / book.scale_factor;
  book.most = kMostY / book.scale_factor;
  book.width = classes.width;
  book.start = 127 + 10 + b + classes.edge - 8 * classes.width;
  book.zero_code = is_signed ? 127 : 0;
  book.zero_ordinal = b;
  return book;
}
constexpr Book8 kSignedBook8 = make_book8(true), kUnsignedBook8 = make_book8(false);

// Scales are floored, so that an all-zero block divides by nothing, and so that no intermediate of an exact decision is
// subnormal.
constexpr float kMinScale8 = 0x1p-76f;

}  // namespace tilewise::optim
