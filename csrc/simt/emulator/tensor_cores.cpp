// ldmatrix, stmatrix, mma.sync and mma.sp: the last lane to arrive gathers the fragments of all 32, multiplies, and
// scatters the result. Lane 4 g + t holds rows g and g + 8 and the columns that belong to t.
#include "block.h"
#include "numbers.h"
#include "race.h"

namespace simt {
namespace rt {

namespace {

template <class Args>
Args& lane_args(void** args, int lane) {
  return *static_cast<Args*>(args[lane]);
}
int group_of(int lane) {
  return lane >> 2;
}
int member_of(int lane) {
  return lane & 3;
}

// ---- ldmatrix, stmatrix ----

struct MatrixArgs {
  uint32_t* r;
  const void* row;
  int tiles;
  bool transposed;
};

// Calls f(lane, tile, half, row, column): which 8x8 element each half of each register is.
template <class F>
void for_each_tile_element(const MatrixArgs& a, F f) {
  for (int lane = 0; lane < kWarp; lane++) {
    for (int tile = 0; tile < a.tiles; tile++) {
      for (int half = 0; half < 2; half++) {
        const int across = 2 * member_of(lane) + half;
        const int down = group_of(lane);
        f(lane, tile, half, a.transposed ? across : down, a.transposed ? down : across);
      }
    }
  }
}

// The rows of all tiles: lane 8 i + r named row r of tile i; the other lanes' addresses are ignored.
void gather_rows(void** args, const char* what, Site at, uint16_t* (&rows)[kWarp]) {
  const int count = 8 * lane_args<MatrixArgs>(args, 0).tiles;
  for (int lane = 0; lane < count; lane++) {
    const void* row = lane_args<MatrixArgs>(args, lane).row;
    check_smem(row, 16, 16, what, at);
    rows[lane] = static_cast<uint16_t*>(const_cast<void*>(row));
  }
}

int warp_thread(int lane) {
  return current->warp * kWarp + lane;
}

void ldmatrix_op(void** args, uint32_t, Site at) {
  const MatrixArgs& first = lane_args<MatrixArgs>(args, 0);
  uint16_t* rows[kWarp];
  gather_rows(args, "ldmatrix", at, rows);
  for (int lane = 0; lane < 8 * first.tiles; lane++) race::read(warp_thread(lane), rows[lane], 16, at);
  for_each_tile_element(first, [&](int lane, int tile, int half, int row, int column) {
    uint32_t& r = lane_args<MatrixArgs>(args, lane).r[tile];
    const uint32_t value = rows[8 * tile + row][column];
    r = half ? (r & 0xffffu) | value << 16 : value;
  });
}

void stmatrix_op(void** args, uint32_t, Site at) {
  const MatrixArgs& first = lane_args<MatrixArgs>(args, 0);
  uint16_t* rows[kWarp];
  gather_rows(args, "stmatrix", at, rows);
  for (int lane = 0; lane < 8 * first.tiles; lane++) race::write(warp_thread(lane), rows[lane], 16, at);
  for_each_tile_element(first, [&](int lane, int tile, int half, int row, int column) {
    const uint32_t r = lane_args<MatrixArgs>(args, lane).r[tile];
    rows[8 * tile + row][column] = static_cast<uint16_t>(half ? r >> 16 : r);
  });
}

// ---- mma ----

// C fragment: rows g and g + 8, columns 2 t and 2 t + 1.
template <class T>
void gather_c(void** args, T* (*fragment)(void*), T (&c)[16][8]) {
  for (int lane = 0; lane < kWarp; lane++) {
    const T* d = fragment(args[lane]);
    for (int i = 0; i < 4; i++) c[group_of(lane) + i / 2 * 8][2 * member_of(lane) + i % 2] = d[i];
  }
}
template <class T>
void scatter_c(void** args, T* (*fragment)(void*), const T (&c)[16][8]) {
  for (int lane = 0; lane < kWarp; lane++) {
    T* d = fragment(args[lane]);
    for (int i = 0; i < 4; i++) d[i] = c[group_of(lane) + i / 2 * 8][2 * member_of(lane) + i % 2];
  }
}

// C += A B. Products are exact in float; they are summed first and then added to C, the order that a tensor core comes
// closest to.
template <class T, int K>
void multiply(const T (&a)[16][K], const T (&b)[K][8], T (&c)[16][8]) {
  for (int row = 0; row < 16; row++) {
    T sum[8] = {};
    for (int k = 0; k < K; k++) {
      for (int n = 0; n < 8; n++) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < 8; n++) c[row][n] += sum[n];
  }
}

// A fragment of 16-bit values: register i holds rows g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next.
template <bool Bf16>
void gather_a16(int lane, const uint32_t* a, float (&out)[16][16]) {
  for (int i = 0; i < 4; i++) {
    const int row = group_of(lane) + i % 2 * 8, column = 2 * member_of(lane) + i / 2 * 8;
    out[row][column] = low_half(a[i], Bf16);
    out[row][column + 1] = high_half(a[i], Bf16);
  }
}
// B fragment of 16-bit values: register i holds rows 2 t + 8 i and the next, column g.
template <bool Bf16, int K>
void gather_b16(int lane, const uint32_t* b, float (&out)[K][8]) {
  for (int i = 0; i < K / 8; i++) {
    const int row = 2 * member_of(lane) + 8 * i;
    out[row][group_of(lane)] = low_half(b[i], Bf16);
    out[row + 1][group_of(lane)] = high_half(b[i], Bf16);
  }
}

struct MmaArgs {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
float* mma_fragment(void* args) {
  return static_cast<MmaArgs*>(args)->d;
}

template <bool Bf16>
void mma_m16n8k16_op(void** args, uint32_t, Site) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    const MmaArgs& x = lane_args<MmaArgs>(args, lane);
    gather_a16<Bf16>(lane, x.a, a);
    gather_b16<Bf16>(lane, x.b, b);
  }
  gather_c(args, mma_fragment, c);
  multiply(a, b, c);
  scatter_c(args, mma_fragment, c);
}

float tf32_operand(uint32_t bits, Site at) {
  if (bits & 0x1fffu) fail("mma tf32: operand %08x was not rounded with to_tf32 (%s:%d)", bits, at.file, at.line);
  return bits_f32(bits);
}

void mma_m16n8k8_tf32_op(void** args, uint32_t, Site at) {
  float a[16][8], b[8][8], c[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    const MmaArgs& x = lane_args<MmaArgs>(args, lane);
    const int g = group_of(lane), t = member_of(lane);
    for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = tf32_operand(x.a[i], at);
    for (int i = 0; i < 2; i++) b[t + 4 * i][g] = tf32_operand(x.b[i], at);
  }
  gather_c(args, mma_fragment, c);
  multiply(a, b, c);
  scatter_c(args, mma_fragment, c);
}

struct MmaHalfArgs {
  uint32_t* d;
  const uint32_t* a;
  uint32_t b[2];
};

void mma_m16n8k16_acc16_op(void** args, uint32_t, Site) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    const MmaHalfArgs& x = lane_args<MmaHalfArgs>(args, lane);
    gather_a16<false>(lane, x.a, a);
    gather_b16<false>(lane, x.b, b);
    for (int i = 0; i < 2; i++) {
      c[group_of(lane) + 8 * i][2 * member_of(lane)] = low_half(x.d[i], false);
      c[group_of(lane) + 8 * i][2 * member_of(lane) + 1] = high_half(x.d[i], false);
    }
  }
  multiply(a, b, c);
  for (int lane = 0; lane < kWarp; lane++) {
    for (int i = 0; i < 2; i++) {
      const float* row = &c[group_of(lane) + 8 * i][2 * member_of(lane)];
      lane_args<MmaHalfArgs>(args, lane).d[i] = pack2<fp16>(row[0], row[1]);
    }
  }
}

struct MmaByteArgs {
  int32_t* d;
  const uint32_t* a;
  const uint32_t* b;
};
int32_t* byte_fragment(void* args) {
  return static_cast<MmaByteArgs*>(args)->d;
}
int32_t signed_byte(uint32_t word, int i) {
  return static_cast<int8_t>(word >> (8 * i));
}

// A register i: row g + 8 (i % 2), columns 4 t + 16 (i / 2) + 0..3; B register i: rows 4 t + 16 i + 0..3, column g.
template <int K>
void mma_s8_op(void** args, uint32_t, Site) {
  int32_t a[16][K], b[K][8], c[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    const MmaByteArgs& x = lane_args<MmaByteArgs>(args, lane);
    const int g = group_of(lane), t = member_of(lane);
    for (int byte = 0; byte < 4; byte++) {
      for (int i = 0; i < K / 8; i++) a[g + i % 2 * 8][4 * t + i / 2 * 16 + byte] = signed_byte(x.a[i], byte);
      for (int i = 0; i < K / 16; i++) b[4 * t + 16 * i + byte][g] = signed_byte(x.b[i], byte);
    }
  }
  gather_c(args, byte_fragment, c);
  multiply(a, b, c);
  scatter_c(args, byte_fragment, c);
}

// ---- sparse mma ----

struct SparseArgs {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t metadata;
};
float* sparse_fragment(void* args) {
  return static_cast<SparseArgs*>(args)->d;
}

// The two positions that a nibble keeps of four columns; the lower index comes first.
void decode_nibble(uint32_t nibble, int lane, Site at, int (&kept)[2]) {
  kept[0] = static_cast<int>(nibble & 3);
  kept[1] = static_cast<int>(nibble >> 2);
  if (kept[0] < kept[1]) return;
  fail("mma.sp: illegal metadata nibble %x from lane %d: positions %d, %d must ascend (%s:%d)", nibble, lane, kept[0],
       kept[1], at.file, at.line);
}

// Lane 4 g + 2 Selector + h: bits 0-15 row g, bits 16-31 row g + 8, for columns 16 h .. 16 h + 15.
template <int Selector>
void expand_row(void** args, const float (&compressed)[16][16], int row, Site at, float (&out)[16][32]) {
  for (int group = 0; group < 8; group++) {
    const int lane = 4 * (row % 8) + 2 * Selector + group / 4;
    const uint32_t metadata = lane_args<SparseArgs>(args, lane).metadata;
    const uint32_t nibble = metadata >> (16 * (row / 8) + 4 * (group % 4)) & 15;
    int kept[2];
    decode_nibble(nibble, lane, at, kept);
    for (int i = 0; i < 2; i++) out[row][4 * group + kept[i]] = compressed[row][2 * group + i];
  }
}

template <bool Bf16, int Selector>
void mma_sp_op(void** args, uint32_t, Site at) {
  float compressed[16][16], b[32][8], c[16][8], a[16][32] = {};
  for (int lane = 0; lane < kWarp; lane++) {
    const SparseArgs& x = lane_args<SparseArgs>(args, lane);
    gather_a16<Bf16>(lane, x.a, compressed);
    gather_b16<Bf16>(lane, x.b, b);
  }
  for (int row = 0; row < 16; row++) expand_row<Selector>(args, compressed, row, at, a);
  gather_c(args, sparse_fragment, c);
  multiply(a, b, c);
  scatter_c(args, sparse_fragment, c);
}

}  // namespace

void ldmatrix(uint32_t* r, int tiles, const void* row, bool transposed, Site at) {
  MatrixArgs args{r, row, tiles, transposed};
  warp_collective(kFullMask, ldmatrix_op, &args, "ldmatrix", at);
}

void stmatrix(const uint32_t* r, int tiles, void* row, bool transposed, Site at) {
  MatrixArgs args{const_cast<uint32_t*>(r), row, tiles, transposed};
  warp_collective(kFullMask, stmatrix_op, &args, "stmatrix", at);
}

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Site at) {
  MmaArgs args{d, a, {b0, b1}};
  warp_collective(kFullMask, is_bf16 ? mma_m16n8k16_op<true> : mma_m16n8k16_op<false>, &args, "mma", at);
}

void mma_m16n8k16_acc16(uint32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site at) {
  MmaHalfArgs args{d, a, {b0, b1}};
  warp_collective(kFullMask, mma_m16n8k16_acc16_op, &args, "mma acc16", at);
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site at) {
  MmaArgs args{d, a, {b0, b1}};
  warp_collective(kFullMask, mma_m16n8k8_tf32_op, &args, "mma tf32", at);
}

void mma_s8(int32_t* d, const uint32_t* a, const uint32_t* b, int k, Site at) {
  MmaByteArgs args{d, a, b};
  warp_collective(kFullMask, k == 16 ? mma_s8_op<16> : mma_s8_op<32>, &args, "mma s8", at);
}

void mma_sp_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, bool is_bf16,
                     Site at) {
  constexpr CollectiveOp ops[2][2] = {{mma_sp_op<false, 0>, mma_sp_op<false, 1>},
                                      {mma_sp_op<true, 0>, mma_sp_op<true, 1>}};
  SparseArgs args{d, a, b, metadata};
  warp_collective(kFullMask, ops[is_bf16][selector], &args, "mma.sp", at);
}

}  // namespace rt
}  // namespace simt
