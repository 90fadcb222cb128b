// What a call of several tokens is given: kernels/prefill_attend/native.py fills these in, field by field.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "vectors.h"

extern "C" {

struct Watch {
  int32_t sum, sumsq, count, important, last;  // rows of the statistics, -1: not asked for
  int32_t statistics, mean;
  float even, factor, softcap;
};

struct Prompt {
  const void *q, *k, *v;
  const int32_t *place;  // of each key: its position, or HIDDEN
  const int32_t *low, *high;  // of each query: the positions that it sees
  const bool* watched;
  const float* sinks;
  float *out, *stats;
  int64_t q_row, q_head, q_next, k_row, k_head, k_next, v_row, v_head, v_next, place_row, place_head;
  int64_t batch, heads, group, queries, keys, dim, wide, position, threads;
};
}

namespace {

constexpr int32_t HIDDEN = -(1 << 30);
constexpr int TILE = 64;  // keys that are multiplied at once
constexpr int LINES = 6;  // rows, likewise: with the vectors of a tile as many sums as there are registers
#ifdef __AVX512F__
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 1;
#endif
constexpr int64_t TALL = 48;  // rows that share what is read of keys and values
constexpr int64_t CHUNKS = 64;  // parts of a head's queries, each with its own sums: the same whoever adds them up
constexpr int64_t LOGITS = 1 << 22, SUMS = 1 << 24;  // floats at most, of a thread and of all chunks: for long prompts

// sums[r] += a[r, i] * b[i] for i < n; b has N vectors.
template <int N, int ROW, int NEXT>
inline void product(const float* a, const float* b, int64_t b_next, int64_t n, Floats (&sums)[LINES][N]) {
  for (int64_t i = 0; i < n; i++) {
    Floats x[N];
    for (int v = 0; v < N; v++) x[v] = floats(b + i * b_next + v * LANES);
    for (int r = 0; r < LINES; r++) {
      const float w = a[r * ROW + i * NEXT];
      for (int v = 0; v < N; v++) sums[r][v] += x[v] * w;
    }
  }
}

// Products of LINES queries [dim, LINES] and a tile of keys [dim, TILE].
inline void logits_of(const float* queries, const float* keys, int64_t dim, float* logits) {
  for (int v = 0; v < TILE / LANES; v += VECTORS) {
    Floats sums[LINES][VECTORS] = {};
    product<VECTORS, 1, LINES>(queries, keys + v * LANES, TILE, dim, sums);
    for (int r = 0; r < LINES; r++)
      for (int w = 0; w < VECTORS; w++) put(logits + r * TILE + (v + w) * LANES, sums[r][w]);
  }
}

template <int N> inline void mix(const float* weights, const float* values, int64_t wide, float* mixed) {
  Floats sums[LINES][N];
  for (int r = 0; r < LINES; r++)
    for (int v = 0; v < N; v++) sums[r][v] = floats(mixed + r * wide + v * LANES);
  product<N, TILE, 1>(weights, values, wide, TILE, sums);
  for (int r = 0; r < LINES; r++)
    for (int v = 0; v < N; v++) put(mixed + r * wide + v * LANES, sums[r][v]);
}

// mixed [LINES, wide] += weights [LINES, TILE] values [TILE, wide]; wide: whole vectors.
inline void mixed_by(const float* weights, const float* values, int64_t wide, float* mixed) {
  int64_t at = 0;
  for (; at + VECTORS * LANES <= wide; at += VECTORS * LANES) mix<VECTORS>(weights, values + at, wide, mixed + at);
  switch ((wide - at) / LANES) {
    case 3: return mix<3>(weights, values + at, wide, mixed + at);
    case 2: return mix<2>(weights, values + at, wide, mixed + at);
    case 1: return mix<1>(weights, values + at, wide, mixed + at);
  }
}

inline Floats tanh_of(Floats x) {
  const Floats far = x < 0.0f ? -x : x, e = exp_of(far * -2.0f), t = (1.0f - e) / (1.0f + e);
  const Floats square = x * x, near = x - x * square * (0.333333333f - square * 0.133333333f);
  return far < 0.04f ? near : (x < 0.0f ? -t : t);
}

inline float most_of(Floats x) {
  float top = -INF;
  for (int s = 0; s < LANES; s++) top = std::max(top, x[s]);
  return top;
}
inline float total_of(Floats x) {
  float all = 0;
  for (int s = 0; s < LANES; s++) all += x[s];
  return all;
}
inline Ints ints(const int32_t* at) {
  Ints x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

}  // namespace
