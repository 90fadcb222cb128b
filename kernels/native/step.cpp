// One token of each sequence through attention and cache: decode_attend in one pass (docs/design/0023).
// Compiled for one shape: GROUP query heads per KV head, keys of DIM entries, values of WIDE, entries of a KIND.
#ifdef _OPENMP
#include <omp.h>
#endif
#include "attend.h"
#include "ending.h"

namespace {

// Of the thread that calls; its team gets pointers.
thread_local std::vector<Head> heads;
thread_local std::vector<float> memory;
thread_local std::vector<Part> parts;
thread_local std::vector<int64_t> owners;

// Facts of all heads; whether this is a step for the roads in torch: padding, no room, an error to be told.
bool unusual(const Rule& rule, const Call& c) {
  const int64_t count = c.batch * c.heads;
  int64_t room = 0, pieces = 0;
  heads.resize(count);
  for (int64_t i = 0; i < count; i++) {
    Head& h = heads[i];
    const int32_t* cursor = c.cursor + i * (rule.ragged ? 6 : 4);
    h.row = i / c.heads;
    h.used = cursor[LIVE] + 1;
    h.place = i * c.places + (rule.ragged ? cursor[SHIFT] : 0);
    h.first = cursor[FIRST] < 0 ? c.position : cursor[FIRST];
    h.size = budget(rule, cursor[SEEN] + 1, c.size) + (rule.ragged ? cursor[EXTRA] : 0);
    if (!rule.ragged && cursor[LIVE] >= c.places) return true;
    if (c.size >= 0 && cursor[SEEN] != c.cursor[SEEN]) return true;  // the budget is that of the first row
    int64_t first = 0, end = c.position + 1, before = c.position, tokens = 1;
    if (c.bounds) {
      const int32_t* own = c.bounds + h.row * 4;
      first = own[0], end = own[1], before = own[2], tokens = own[3];
    }
    if (end != c.position + 1 || tokens <= 0 || std::min(before, c.position - c.low) > cursor[SEEN]) return true;
    const bool apart = before == 0 || first > h.first || before != c.position - first;
    h.hides = h.first < c.position && (c.low > h.first || apart);
    if (rule.picks && rule.number < 0 && c.position - h.first != cursor[SEEN]) return true;
    h.first_piece = pieces;
    h.pieces = (h.used + PIECE - 1) / PIECE;
    h.padded = (h.used + LANES - 1) / LANES * LANES;
    pieces += h.pieces;
    room += h.padded * GROUP;
  }
  if ((int64_t)memory.size() < room) memory.resize(room + room / 8);
  if ((int64_t)parts.size() < pieces) parts.resize(pieces + pieces / 8);
  owners.resize(pieces);
  float* at = memory.data();
  for (int64_t i = 0; i < count; i++) {
    heads[i].weights = at;
    at += heads[i].padded * GROUP;
    for (int64_t p = 0; p < heads[i].pieces; p++) owners[heads[i].first_piece + p] = i;
  }
  return false;
}

void append(const Rule& rule, const Call& c) {
  const int64_t plane = c.batch * c.heads * c.places;
  for (int64_t i = 0; i < c.batch * c.heads; i++) {
    const int64_t b = i / c.heads, n = i % c.heads;
    const int64_t slot = heads[i].place + c.cursor[i * (rule.ragged ? 6 : 4) + FREE];
    std::memcpy((Entry*)c.k + slot * DIM, (const Entry*)c.k_new + b * c.k_row + n * c.k_head, DIM * sizeof(Entry));
    std::memcpy((Entry*)c.v + slot * WIDE, (const Entry*)c.v_new + b * c.v_row + n * c.v_head, WIDE * sizeof(Entry));
    c.pos[slot] = (int32_t)c.position;
    for (int64_t s = 0; s < rule.statistics; s++)
      c.stats[s * plane + slot] = c.arrive ? c.arrive[s * c.batch * c.heads + i] : 0.0f;
  }
}

}  // namespace

extern "C" int step(const Rule* rule, const Call* call) {
  const Rule& r = *rule;
  const Call& c = *call;
  if (unusual(r, c)) return 1;
  append(r, c);
  const int64_t count = c.batch * c.heads, pieces = heads.back().first_piece + heads.back().pieces;
  Head* all = heads.data();
  Part* own = parts.data();
  const int64_t* owner = owners.data();
  const int threads = std::max<int64_t>(1, std::min<int64_t>(c.threads, pieces / 4));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
#else
    const int64_t me = 0, team = 1;
#endif
    alignas(64) float queries[GROUP * KEY * LANES] = {};
    int64_t of = -1;
    const int64_t begin = pieces * me / team, end = pieces * (me + 1) / team;
    for (int64_t p = begin; p < end; p++) {
      const Head& h = all[owner[p]];
      if (of != owner[p]) {
        of = owner[p];
        for (int g = 0; g < GROUP; g++) {
          const Entry* q = (const Entry*)c.q + h.row * c.q_row + ((of % c.heads) * GROUP + g) * c.q_head;
          for (int b = 0; b < KEY; b++) put(queries + (g * KEY + b) * LANES, block<DIM>(q, b) * r.factor);
        }
      }
      const int64_t at = p - h.first_piece, next = std::min(p + 1, pieces - 1);
      const Head& then = all[owner[next]];
      piece(r, c, h, queries, at, own[p], (const Entry*)c.k + (then.place + (next - then.first_piece) * PIECE) * DIM);
      if (at + 1 == h.pieces && h.first_piece >= begin) finish(r, c, h, own, of);
    }
#pragma omp barrier
    for (int64_t i = begin < end ? owner[begin] : count; i < count && all[i].first_piece < end; i++)
      if (all[i].first_piece >= begin && all[i].first_piece + all[i].pieces > end) finish(r, c, all[i], own, i);
  }
  return 0;
}
