// What follows once all pieces of a head are known: output, statistics, the victim.
#pragma once
#include "step.h"

namespace {

// The output of a head; in each part, what its weights are to be multiplied by to be probabilities, as `top`.
void join(const Call& c, const Head& h, Part* parts, int64_t which) {
  for (int g = 0; g < GROUP; g++) {
    const int64_t query = (which % c.heads) * GROUP + g;
    const float sink = c.sinks ? c.sinks[query] : -INF;
    float top = sink;
    for (int64_t p = 0; p < h.pieces; p++)
      if (parts[p].total[g] > 0) top = std::max(top, parts[p].top[g]);
    float total = sink > -INF ? std::exp(sink - top) : 0.0f;
    Floats mixed[VALUE] = {};
    for (int64_t p = 0; p < h.pieces; p++) {
      const float share = parts[p].total[g] > 0 ? std::exp(parts[p].top[g] - top) : 0.0f;
      parts[p].top[g] = share;
      total += parts[p].total[g] * share;
      for (int b = 0; b < VALUE; b++) mixed[b] += floats(parts[p].mixed[g] + b * LANES) * share;
    }
    const float one = total > 0 ? 1.0f / total : 0.0f;
    for (int64_t p = 0; p < h.pieces; p++) parts[p].top[g] *= one;
    float all[VALUE * LANES];
    for (int b = 0; b < VALUE; b++) put(all + b * LANES, mixed[b] * one);
    std::memcpy(c.out + (h.row * c.heads * GROUP + query) * WIDE, all, WIDE * sizeof(float));
  }
}

// The row of probabilities that a KV head observes, in the place of its first query head's weights.
void reduce(const Rule& rule, const Head& h, const Part* parts) {
  for (int64_t p = 0; p < h.pieces; p++)
    for (int64_t j = p * PIECE; j < std::min(h.padded, (p + 1) * PIECE); j += LANES) {
      Floats row = floats(h.weights + j) * parts[p].top[0];
      for (int g = 1; g < GROUP; g++) {
        const Floats other = floats(h.weights + g * h.padded + j) * parts[p].top[g];
        row = rule.mean ? row + other : other > row ? other : row;
      }
      put(h.weights + j, rule.mean ? row * (1.0f / GROUP) : row);
    }
}

// Statistics, of the row that `reduce` left.
void observe(const Rule& rule, const Call& c, const Head& h, int64_t number) {
  const float* row = h.weights;
  const int64_t plane = c.batch * c.heads * c.places;
  const int32_t* pos = c.pos + h.place;
  auto table = [&](int at) {
    float* t = c.stats + at * plane + h.place;
    if (rule.replaces) std::fill(t, t + h.used, 0.0f);
    return t;
  };
  int64_t shown = h.used;
  if (h.hides) { shown = 0; for (int64_t j = 0; j < h.used; j++) shown += seen(c, h, pos[j]); }
  const float even = rule.even / std::max<int64_t>(shown, 1);
  if (rule.sum >= 0) { float* t = table(rule.sum); for (int64_t j = 0; j < h.used; j++) t[j] += row[j]; }
  if (rule.sumsq >= 0) { float* t = table(rule.sumsq); for (int64_t j = 0; j < h.used; j++) t[j] += row[j] * row[j]; }
  if (rule.count >= 0) {
    float* t = table(rule.count);
    if (h.hides) for (int64_t j = 0; j < h.used; j++) t[j] += seen(c, h, pos[j]);
    else for (int64_t j = 0; j < h.used; j++) t[j] += 1.0f;
  }
  if (rule.important >= 0) { float* t = table(rule.important); for (int64_t j = 0; j < h.used; j++) t[j] += row[j] >= even; }
  if (rule.last >= 0) { float* t = table(rule.last); for (int64_t j = 0; j < h.used; j++) t[j] = row[j] >= even ? number + 1 : t[j]; }
}

// The slot that goes: the lowest score that nothing protects, the newest of equals.
int64_t victim(const Rule& rule, const Call& c, const Head& h, int64_t number) {
  const int64_t plane = c.batch * c.heads * c.places, recent = rule.recent + h.size * rule.recent_num / rule.recent_den;
  const int32_t* pos = c.pos + h.place;
  auto table = [&](int at) { return at < 0 ? (const float*)nullptr : c.stats + at * plane + h.place; };
  const float *own = table(rule.row), *per = table(rule.per), *weight = table(rule.weight), *mark = table(rule.mark);
  const float* numbers = table(rule.number);
  float* score = h.weights;  // no longer needed
  const int64_t used = h.used;
  if (rule.by == 0) for (int64_t j = 0; j < used; j++) score[j] = (float)pos[j];
  else if (rule.by == 1) std::memcpy(score, own, used * sizeof(float));
  else if (rule.by == 2) for (int64_t j = 0; j < used; j++) score[j] = own[j] / std::max(per[j], 1.0f);
  else for (int64_t j = 0; j < used; j++) score[j] = own[j] - 1.0f - (float)number;
  if (rule.decay)
    for (int64_t j = 0; j < used; j++) score[j] *= numbers ? (float)number - numbers[j] : (float)(number - pos[j]);
  if (weight)
    for (int64_t j = 0; j < used; j++) {
      const float weighted = (score[j] + rule.weight_floor) * weight[j];
      score[j] = rule.scored && score[j] >= rule.unscored ? score[j] : weighted;
    }
  const int64_t low = numbers ? rule.sinks : h.first + rule.sinks;
  int64_t high = (numbers ? number : c.position) - recent;
  if (low > high) high = -2;
  const int32_t first = (int32_t)low, last = (int32_t)high;
  if (numbers)
    for (int64_t j = 0; j < used; j++) {
      const int32_t at = (int32_t)numbers[j];
      score[j] = (at < first) | (at > last) ? INF : score[j];
    }
  else for (int64_t j = 0; j < used; j++) score[j] = (pos[j] < first) | (pos[j] > last) ? INF : score[j];
  if (mark) for (int64_t j = 0; j < used; j++) score[j] = mark[j] >= rule.keep ? INF : score[j];
  std::fill(score + used, score + h.padded, INF);
  Floats lowest = floats(score);
  for (int64_t j = LANES; j < h.padded; j += LANES) {
    const Floats x = floats(score + j);
    lowest = x < lowest ? x : lowest;
  }
  float least = INF;
  for (int s = 0; s < LANES; s++) least = lowest[s] < least ? lowest[s] : least;
  int32_t newest = -1, found = 0;
  for (int32_t j = 0; j < used; j++) newest = std::max(newest, score[j] == least ? pos[j] : -1);
  for (int32_t j = 0; j < used; j++) found = std::max(found, pos[j] == newest ? j : 0);
  return found;
}

void finish(const Rule& rule, const Call& c, const Head& h, Part* parts, int64_t which) {
  const bool observes = rule.observes;
  int32_t* cursor = c.cursor + which * (rule.ragged ? 6 : 4);
  const int64_t number = cursor[SEEN];
  join(c, h, parts + h.first_piece, which);
  if (observes) {
    reduce(rule, h, parts + h.first_piece);
    observe(rule, c, h, number);
  }
  if (!rule.picks) return;
  cursor[SEEN]++;
  cursor[FIRST] = (int32_t)h.first;
  if (h.used > h.size) {
    const int64_t slot = victim(rule, c, h, number);
    cursor[FREE] = (int32_t)slot;
    c.pos[h.place + slot] = -1;
  } else {
    cursor[LIVE]++;
    cursor[FREE] = cursor[LIVE];
  }
}

}  // namespace
