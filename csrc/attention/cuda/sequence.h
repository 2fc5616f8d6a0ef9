// Where a block works: its sequence, head and tile, for batched [b, h, s, d] and packed [t, h, d] tensors alike.
#pragma once
#include "attention/params.h"
#include "simt/simt.h"

namespace tilewise::attention {

using namespace simt;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Sequence {
  int batch;             // 0 in packed tensors
  int64_t q_row, k_row;  // first row in packed tensors, else 0
  int q_len, k_len;
};

struct Span {
  int64_t begin;
  int length;
};

// Sequence b of a packed tensor. Offsets outside the tensor are reported and never followed: the sequence is empty.
SIMT_DEVICE Span packed_span(const int32_t* cu_seqlens, int b, int64_t total, int longest, uint32_t* fault) {
  const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
  if (begin >= 0 && begin <= end && end <= total && end - begin <= longest)
    return {begin, static_cast<int>(end - begin)};
  if (fault) *fault = kBadCuSeqlens;
  return {0, 0};
}

SIMT_DEVICE Sequence find_sequence(const ForwardParams& p, int b, uint32_t* fault) {
  if (!p.cu_seqlens_q) return {b, 0, 0, p.seq_q, p.seq_k};
  const Span q = packed_span(p.cu_seqlens_q, b, p.total_q, p.seq_q, fault);
  const Span k = packed_span(p.cu_seqlens_k, b, p.total_k, p.seq_k, fault);
  return {0, q.begin, k.begin, q.length, k.length};
}

// What a block works on: `Rows` rows from `first` on, of one sequence and one of `heads` heads. The grid has one
// dimension, (sequence, head, tile), tiles fastest: blocks that run together share keys and values.
struct Work {
  Sequence seq;
  int sequence, head, first;
};
template <int Rows>
SIMT_DEVICE Work find_work(const ForwardParams& p, int tiles, int heads, bool last_tile_first, uint32_t* fault) {
  const int index = static_cast<int>(block_idx().x);
  const int sequence = index / tiles / heads, head = index / tiles % heads, tile = index % tiles;
  return {find_sequence(p, sequence, fault), sequence, head, (last_tile_first ? tiles - 1 - tile : tile) * Rows};
}
SIMT_DEVICE int kv_head_of(const ForwardParams& p, int head) {
  return head / (p.q_heads / p.kv_heads);
}

template <class T>
SIMT_DEVICE const T* row_pointer(const void* base, const Strides& s, int batch, int head, int64_t row) {
  return static_cast<const T*>(base) + batch * s.batch + head * s.head + row * s.row;
}
template <class T>
SIMT_DEVICE T* row_pointer(void* base, const Strides& s, int batch, int head, int64_t row) {
  return static_cast<T*>(base) + batch * s.batch + head * s.head + row * s.row;
}

// Index of the sequence's first row in lse and delta.
SIMT_DEVICE int64_t stats_index(const ForwardParams& p, const Sequence& q, int head) {
  return p.cu_seqlens_q ? head * p.total_q + q.q_row : (static_cast<int64_t>(q.batch) * p.q_heads + head) * p.seq_q;
}

template <class T>
SIMT_DEVICE float to_float(T v) {
  if constexpr (is_same_v<T, float>)
    return v;
  else
    return to_f32(v);
}
template <class T>
SIMT_DEVICE T from_float(float v) {
  if constexpr (is_same_v<T, float>)
    return v;
  else
    return from_f32<T>(v);
}

SIMT_DEVICE int min_of(int a, int b) {
  return a < b ? a : b;
}
SIMT_DEVICE int max_of(int a, int b) {
  return a > b ? a : b;
}

}  // namespace tilewise::attention
