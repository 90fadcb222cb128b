// Attention of one token over a piece of a head's slots: keys and values are read once.
#pragma once
#include "step.h"

namespace {

// Ask memory for entries that are read soon: keys while values are read, and the other way round.
inline void fetch(const Entry* at, int entries) {
  for (int b = 0; b < entries * (int)sizeof(Entry); b += 64) __builtin_prefetch((const char*)at + b);
}

// ahead: the keys of the piece that comes next.
void piece(const Rule& rule, const Call& c, const Head& h, const float* queries, int64_t at, Part& part,
           const Entry* ahead) {
  const int64_t begin = at * PIECE, end = std::min(begin + PIECE, h.used), n = end - begin;
  const Entry* keys = (const Entry*)c.k + (h.place + begin) * DIM;
  const Entry* values = (const Entry*)c.v + (h.place + begin) * WIDE;
  float* weights = h.weights + begin;
  constexpr bool HELD = GROUP * KEY <= 16;  // in registers
  Floats asked[HELD ? GROUP * KEY : 1];
  if (HELD)
    for (int i = 0; i < GROUP * KEY; i++) asked[i] = floats(queries + i * LANES);
  for (int64_t j = 0; j < n; j += LANES) {
    Floats tile[GROUP][LANES];
    const int count = std::min<int64_t>(LANES, n - j);
    for (int s = 0; s < LANES; s++) {
      if (s >= count) {
        for (int g = 0; g < GROUP; g++) tile[g][s] = Floats{};
        continue;
      }
      const Entry* row = keys + (j + s) * DIM;
      fetch(values + (j + s) * WIDE, WIDE);
      Floats x[KEY];
      for (int b = 0; b < KEY; b++) x[b] = block<DIM>(row, b);
      for (int g = 0; g < GROUP; g++) {
        Floats dot = x[0] * (HELD ? asked[g * KEY] : floats(queries + g * KEY * LANES));
        for (int b = 1; b < KEY; b++)
          dot += x[b] * (HELD ? asked[g * KEY + b] : floats(queries + (g * KEY + b) * LANES));
        tile[g][s] = dot;
      }
    }
    for (int g = 0; g < GROUP; g++) {
      float* logits = weights + g * h.padded + j;
      put(logits, sums(tile[g]));
      if (rule.softcap > 0)
        for (int s = 0; s < count; s++) logits[s] = std::tanh(logits[s]) * rule.softcap;
      for (int s = count; s < LANES; s++) logits[s] = -INF;
    }
  }
  if (h.hides)
    for (int64_t j = 0; j < n; j++)
      if (!seen(c, h, c.pos[h.place + begin + j]))
        for (int g = 0; g < GROUP; g++) weights[g * h.padded + j] = -INF;
  for (int g = 0; g < GROUP; g++) {
    float* x = weights + g * h.padded;
    Floats most = floats(x);
    for (int64_t j = LANES; j < n; j += LANES) {
      const Floats y = floats(x + j);
      most = y > most ? y : most;
    }
    float top = -INF;
    for (int s = 0; s < LANES; s++) top = std::max(top, most[s]);
    const float from = top > -INF ? top : 0.0f;
    Floats total{};
    for (int64_t j = 0; j < n; j += LANES) {
      const Floats e = exp_of(floats(x + j) - from);
      total += e;
      put(x + j, e);
    }
    float all = 0;
    for (int s = 0; s < LANES; s++) all += total[s];
    part.top[g] = from;
    part.total[g] = all;
  }
  constexpr int AT_ONCE = std::max(1, std::min<int>(GROUP, 24 / VALUE));
  for (int first = 0; first < GROUP; first += AT_ONCE) {
    const int some = std::min(AT_ONCE, GROUP - first);
    Floats mixed[AT_ONCE][VALUE] = {};
    const float* w = weights + first * h.padded;
    if (some == AT_ONCE)
      for (int64_t j = 0; j < n; j++) {
        const Entry* row = values + j * WIDE;
        if (!first) fetch(ahead + j * DIM, DIM);
        Floats x[VALUE];
        for (int b = 0; b < VALUE; b++) x[b] = block<WIDE>(row, b);
        for (int g = 0; g < AT_ONCE; g++)
          for (int b = 0; b < VALUE; b++) mixed[g][b] += x[b] * w[g * h.padded + j];
      }
    else
      for (int64_t j = 0; j < n; j++) {
        const Entry* row = values + j * WIDE;
        for (int g = 0; g < some; g++)
          for (int b = 0; b < VALUE; b++) mixed[g][b] += block<WIDE>(row, b) * w[g * h.padded + j];
      }
    for (int g = 0; g < some; g++)
      for (int b = 0; b < VALUE; b++) put(part.mixed[first + g] + b * LANES, mixed[g][b]);
  }
}

}  // namespace
