// What a step is given: kernels/decode_attend/native.py fills these in, field by field; names are those of docs/design/0001.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

extern "C" {

struct Rule {
  int32_t sum, sumsq, count, important, last;     // rows of statistics that a step adds to, -1: not kept
  int32_t statistics, observes, replaces, mean;
  int32_t ragged, picks;
  int32_t by, row, per, weight, mark, number, decay, scored;  // by: 0 position, 1 a statistic, 2 a share of counts, 3 last
  int32_t sinks, recent, recent_num, recent_den;
  int32_t slots, num, den, floor;
  float weight_floor, even, factor, softcap, unscored, keep;
};

struct Call {
  const void *q, *k_new, *v_new;
  void *k, *v;
  int32_t *pos, *cursor;
  float *stats, *out;
  const float *arrive, *sinks;
  const bool *tokens;
  const int32_t *bounds;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  int64_t batch, heads, places, position, low, columns, size, threads;
};
}

namespace {

constexpr int PIECE = 64;  // slots of a piece: its keys and values stay in a core's first cache
constexpr int KEY = blocks(DIM), VALUE = blocks(WIDE);
constexpr int LIVE = 0, FREE = 1, SEEN = 2, FIRST = 3, EXTRA = 4, SHIFT = 5;

struct Head {
  int64_t row, place, used, first_piece, pieces, size;
  float* weights;  // [GROUP, padded]
  int64_t padded, first;
  bool hides;
};
struct Part {  // of a piece, for each query head
  float top[GROUP], total[GROUP], mixed[GROUP][VALUE * LANES];
};

inline int64_t budget(const Rule& rule, int64_t seen, int64_t size) {
  if (size >= 0) return size;
  return rule.slots ? rule.slots : std::max<int64_t>(rule.floor, seen * rule.num / rule.den);
}

inline bool seen(const Call& c, const Head& h, int32_t pos) {
  if (pos < c.low) return false;
  return !c.tokens || c.tokens[h.row * c.columns + pos];
}

}  // namespace
