// Attention of several tokens, and what each key gets of it, in one pass (docs/design/0025): a block of rows keeps its
// probabilities until their sums are known, so no product is made twice. Compiled for entries of a KIND; shapes are
// arguments.
#ifdef _OPENMP
#include <omp.h>
#endif
#include "prefill.h"

namespace {

using Numbers = std::unique_ptr<float[]>;

// Keys and values of one head as tiles, and where they stand; the team's.
struct Head {
  int64_t tiles, width;  // width: entries of a value, whole vectors
  Numbers keys, values;  // [tiles, dim, TILE], [tiles, TILE, width]
  Numbers sums;  // [chunks, statistics, tiles * TILE]
  std::vector<int32_t> place, first, last, least;  // of a key; of a tile's keys: lowest, highest that are seen, lowest
  std::vector<char> touched;  // whether a chunk has sums
};

// Some queries of a head, with all query heads of its group: row g * count + i; a thread's own.
struct Block {
  int64_t top, count, rows, lines;  // the first query, queries, rows, rows in whole LINES
  Numbers queries, logits, mixed;  // [lines / LINES, dim, LINES], [tiles, lines, TILE], [lines, width]
  std::vector<Floats> tops, totals;
  std::vector<float> from, share;  // of a row: its highest logit, one over its sum
  std::vector<int32_t> shown;  // tiles that some row sees
  std::vector<char> whole;  // whether all rows see all keys of it
  std::vector<int32_t> seen;  // keys that a query sees
};

void pack(const Prompt& c, Head& head, int64_t b, int64_t h, int64_t t) {
  const Entry* k = (const Entry*)c.k + b * c.k_row + h * c.k_head;
  const Entry* v = (const Entry*)c.v + b * c.v_row + h * c.v_head;
  const int32_t* place = c.place + b * c.place_row + h * c.place_head;
  const int64_t begin = t * TILE, n = std::min<int64_t>(TILE, c.keys - begin);
  float* keys = head.keys.get() + begin * c.dim;
  float* values = head.values.get() + begin * head.width;
  for (int64_t j = 0; j < TILE; j++) {
    alignas(64) float row[LANES];
    for (int64_t d = 0; d < c.dim; d += LANES) {
      const int some = std::min<int64_t>(LANES, c.dim - d);
      put(row, j < n ? load_some(k + (begin + j) * c.k_next + d, some) : Floats{});
      for (int i = 0; i < some; i++) keys[(d + i) * TILE + j] = row[i];
    }
    for (int64_t d = 0; d < head.width; d += LANES) {
      const int some = std::min<int64_t>(LANES, c.wide - d);
      put(values + j * head.width + d, j < n ? load_some(v + (begin + j) * c.v_next + d, some) : Floats{});
    }
  }
  int32_t first = HIDDEN, last = HIDDEN, least = 0;
  for (int64_t j = 0; j < TILE; j++) {
    const int32_t at = j < n ? place[begin + j] : HIDDEN;
    head.place[begin + j] = at;
    least = j ? std::min(least, at) : at;
    last = std::max(last, at);
    if (at != HIDDEN) first = first == HIDDEN ? at : std::min(first, at);
  }
  head.first[t] = first, head.last[t] = last, head.least[t] = least;
}

// Hides what rows may not see, and counts the rest.
void hide(const Prompt& c, const int32_t* place, Block& own, float* tile) {
  for (int64_t r = 0; r < own.rows; r++) {
    const int64_t i = r % own.count;
    Ints all{};
    for (int v = 0; v < TILE; v += LANES) {
      const Ints at = ints(place + v), seen = (at >= c.low[own.top + i]) & (at <= c.high[own.top + i]);
      float* x = tile + r * TILE + v;
      put(x, seen ? floats(x) : Floats{} - INF);
      all -= seen;
    }
    if (r < own.count)
      for (int s = 0; s < LANES; s++) own.seen[i] += all[s];
  }
}

// Logits of a block's rows with the tiles that some of them see.
void multiply(const Watch& w, const Prompt& c, const Head& head, Block& own) {
  const auto [low, low_most] = std::minmax_element(c.low + own.top, c.low + own.top + own.count);
  const auto [high_least, high] = std::minmax_element(c.high + own.top, c.high + own.top + own.count);
  own.tops.assign(own.lines, Floats{} - INF);
  own.seen.assign(own.count, 0);
  own.shown.clear(), own.whole.clear();
  for (int64_t t = 0; t < head.tiles; t++) {
    if (head.last[t] == HIDDEN || head.last[t] < *low || head.first[t] > *high) continue;
    float* tile = own.logits.get() + own.shown.size() * own.lines * TILE;
    own.shown.push_back(t);
    own.whole.push_back(head.least[t] >= *low_most && head.last[t] <= *high_least);
    for (int64_t r = 0; r < own.lines; r += LINES)
      logits_of(own.queries.get() + r * c.dim, head.keys.get() + t * TILE * c.dim, c.dim, tile + r * TILE);
    if (w.softcap > 0)
      for (int64_t x = 0; x < own.lines * TILE; x += LANES) put(tile + x, tanh_of(floats(tile + x)) * w.softcap);
    if (!own.whole.back()) hide(c, head.place.data() + t * TILE, own, tile);
    for (int64_t i = 0; i < own.count && own.whole.back(); i++) own.seen[i] += TILE;
    for (int64_t r = 0; r < own.lines; r++) {
      Floats most = own.tops[r];
      for (int v = 0; v < TILE; v += LANES) {
        const Floats x = floats(tile + r * TILE + v);
        most = x > most ? x : most;
      }
      own.tops[r] = most;
    }
  }
}

// Probabilities, not yet over their sums, and values mixed by them.
void attend(const Prompt& c, const Head& head, Block& own, int64_t h) {
  own.from.resize(own.lines), own.share.resize(own.lines);
  own.totals.assign(own.lines, Floats{});
  for (int64_t r = 0; r < own.lines; r++) {
    float top = most_of(own.tops[r]);
    if (c.sinks && r < own.rows) top = std::max(top, c.sinks[h * c.group + r / own.count]);
    own.from[r] = top > -INF ? top : 0.0f;
  }
  std::fill(own.mixed.get(), own.mixed.get() + own.lines * head.width, 0.0f);
  for (size_t x = 0; x < own.shown.size(); x++) {
    float* tile = own.logits.get() + x * own.lines * TILE;
    for (int64_t r = 0; r < own.lines; r++)
      for (int v = 0; v < TILE; v += LANES) {
        const Floats e = exp_of(floats(tile + r * TILE + v) - own.from[r]);
        own.totals[r] += e;
        put(tile + r * TILE + v, e);
      }
    const float* values = head.values.get() + own.shown[x] * TILE * head.width;
    for (int64_t r = 0; r < own.lines; r += LINES)
      mixed_by(tile + r * TILE, values, head.width, own.mixed.get() + r * head.width);
  }
  for (int64_t r = 0; r < own.lines; r++) {
    float all = total_of(own.totals[r]);
    if (c.sinks && r < own.rows) all += std::exp(c.sinks[h * c.group + r / own.count] - own.from[r]);
    own.share[r] = all > 0 ? 1.0f / all : 0.0f;
  }
}

void write(const Prompt& c, const Head& head, const Block& own, int64_t b, int64_t h) {
  for (int64_t r = 0; r < own.rows; r++) {
    const int64_t g = r / own.count, i = own.top + r % own.count;
    float* out = c.out + ((b * c.queries + i) * c.heads * c.group + h * c.group + g) * c.wide;
    for (int64_t d = 0; d < c.wide; d++) out[d] = own.mixed[r * head.width + d] * own.share[r];
  }
}

inline void add(float* at, Floats x) { put(at, floats(at) + x); }

// What a tile's keys get, where only sums over heads and queries are asked for. to: [TILE]
void add_all(const Block& own, const float* tile, float weight, float* to) {
  Floats sums[TILE / LANES] = {};
  for (int64_t r = 0; r < own.rows; r++)
    for (int v = 0; v < TILE / LANES; v++) sums[v] += floats(tile + r * TILE + v * LANES) * own.share[r];
  for (int v = 0; v < TILE / LANES; v++) add(to + v * LANES, sums[v] * weight);
}

// The same, query by query. to: [statistics, plane], of which a tile's
void add_each(const Watch& w, const Prompt& c, const Block& own, const bool* watched, const float* tile, float weight,
              float* to, int64_t plane) {
  for (int v = 0; v < TILE; v += LANES) {
    Floats sum{}, square{}, important{}, last{};
    for (int64_t i = 0; i < own.count; i++) {
      if (!watched[i]) continue;
      Floats row = floats(tile + i * TILE + v) * own.share[i];
      for (int64_t r = i + own.count; r < own.rows; r += own.count) {
        const Floats other = floats(tile + r * TILE + v) * own.share[r];
        row = w.mean ? row + other : (other > row ? other : row);
      }
      row *= weight;
      sum += row;
      square += row * row;
      const Ints hit = row >= w.even / std::max(own.seen[i], 1);
      important += hit ? Floats{} + 1.0f : Floats{};
      last = hit ? Floats{} + (float)(c.position + own.top + i + 1) : last;
    }
    if (w.sum >= 0) add(to + w.sum * plane + v, sum);
    if (w.sumsq >= 0) add(to + w.sumsq * plane + v, square);
    if (w.important >= 0) add(to + w.important * plane + v, important);
    if (w.last >= 0) {
      float* newest = to + w.last * plane + v;
      put(newest, last > floats(newest) ? last : floats(newest));
    }
  }
}

// How many watched queries see each key of a tile.
void count(const Prompt& c, const Block& own, const bool* watched, const int32_t* place, bool whole, float* to) {
  const float all = std::count(watched, watched + own.count, true);
  for (int v = 0; v < TILE; v += LANES) {
    const Ints at = ints(place + v);
    Floats shown{};
    for (int64_t i = own.top; i < own.top + own.count && !whole; i++)
      if (watched[i - own.top]) shown += (at >= c.low[i]) & (at <= c.high[i]) ? Floats{} + 1.0f : Floats{};
    add(to + v, whole ? Floats{} + all : shown);
  }
}

// What the keys get of the block's watched queries. sums: [statistics, keys in whole tiles].
void observe(const Watch& w, const Prompt& c, const Head& head, Block& own, const bool* watched, float* sums) {
  const int64_t plane = head.tiles * TILE;
  const bool alone = !w.mean || w.sumsq >= 0 || w.important >= 0 || w.last >= 0;
  const float weight = w.mean ? 1.0f / c.group : 1.0f;
  for (int64_t r = 0; r < own.rows; r++)
    if (!watched[r % own.count]) own.share[r] = 0.0f;
  for (size_t x = 0; x < own.shown.size(); x++) {
    const float* tile = own.logits.get() + x * own.lines * TILE;
    float* to = sums + own.shown[x] * TILE;
    if (alone)
      add_each(w, c, own, watched, tile, weight, to, plane);
    else if (w.sum >= 0)
      add_all(own, tile, weight, to + w.sum * plane);
    if (w.count >= 0)
      count(c, own, watched, head.place.data() + own.shown[x] * TILE, own.whole[x], to + w.count * plane);
  }
}

// The block's queries, scaled.
void take(const Watch& w, const Prompt& c, Block& own, int64_t b, int64_t h) {
  own.rows = own.count * c.group, own.lines = (own.rows + LINES - 1) / LINES * LINES;
  std::fill(own.queries.get(), own.queries.get() + own.lines * c.dim, 0.0f);
  for (int64_t r = 0; r < own.rows; r++) {
    const int64_t g = r / own.count, i = own.top + r % own.count;
    const Entry* q = (const Entry*)c.q + b * c.q_row + (h * c.group + g) * c.q_head + i * c.q_next;
    float* to = own.queries.get() + r / LINES * LINES * c.dim + r % LINES;
    for (int64_t d = 0; d < c.dim; d += LANES) {
      const int some = std::min<int64_t>(LANES, c.dim - d);
      const Floats x = load_some(q + d, some) * w.factor;
      for (int s = 0; s < some; s++) to[(d + s) * LINES] = x[s];
    }
  }
}

// The chunks' sums as statistics of the keys of a tile; at: row and head.
void gather(const Watch& w, const Prompt& c, const Head& head, int64_t chunks, int64_t at, int64_t t) {
  const int64_t plane = head.tiles * TILE, n = std::min<int64_t>(TILE, c.keys - t * TILE);
  for (int64_t s = 0; s < w.statistics; s++)
    for (int64_t j = t * TILE; j < t * TILE + n; j++) {
      float all = 0;
      for (int64_t x = 0; x < chunks; x++) {
        if (!head.touched[x]) continue;
        const float one = head.sums[(x * w.statistics + s) * plane + j];
        all = s == w.last ? std::max(all, one) : all + one;
      }
      c.stats[(s * c.batch * c.heads + at) * c.keys + j] = all;
    }
}

}  // namespace

extern "C" void prefill(const Watch* watch, const Prompt* prompt) {
  const Watch& w = *watch;
  const Prompt& c = *prompt;
  Head head;
  head.tiles = std::max<int64_t>(1, (c.keys + TILE - 1) / TILE);
  head.width = (c.wide + LANES - 1) / LANES * LANES;
  const int64_t plane = head.tiles * TILE;
  const int64_t tall = std::max<int64_t>(1, std::min(TALL, LOGITS / plane) / c.group);
  const int64_t blocks = (c.queries + tall - 1) / tall, most = SUMS / (plane * std::max(1, w.statistics));
  const int64_t chunks = std::min({blocks, CHUNKS, std::max<int64_t>(1, most)});
  head.keys.reset(new float[plane * c.dim]), head.values.reset(new float[plane * head.width]);
  head.sums.reset(new float[chunks * w.statistics * plane]);
  head.place.resize(plane), head.first.resize(head.tiles), head.last.resize(head.tiles), head.least.resize(head.tiles);
  head.touched.resize(chunks);
  const int64_t lines = (std::min(tall, c.queries) * c.group + LINES - 1) / LINES * LINES;
  const int threads = std::max<int64_t>(1, std::min(c.threads, chunks));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Block own;
    own.queries.reset(new float[lines * c.dim]), own.mixed.reset(new float[lines * head.width]);
    own.logits.reset(new float[lines * plane]);
    for (int64_t at = 0; at < c.batch * c.heads; at++) {
      const int64_t b = at / c.heads, h = at % c.heads;
#pragma omp for
      for (int64_t t = 0; t < head.tiles; t++) pack(c, head, b, h, t);
#pragma omp for schedule(dynamic, 1)
      for (int64_t x = chunks - 1; x >= 0; x--) {  // late queries see most: first
        float* sums = head.sums.get() + x * w.statistics * plane;
        head.touched[x] = 0;
        for (int64_t y = blocks * x / chunks; y < blocks * (x + 1) / chunks; y++) {
          own.top = y * tall, own.count = std::min(tall, c.queries - own.top);
          take(w, c, own, b, h);
          multiply(w, c, head, own);
          attend(c, head, own, h);
          write(c, head, own, b, h);
          const bool* watched = c.watched + b * c.queries + own.top;
          if (!w.statistics || std::find(watched, watched + own.count, true) == watched + own.count) continue;
          if (!head.touched[x]) std::fill(sums, sums + w.statistics * plane, 0.0f);
          head.touched[x] = 1;
          observe(w, c, head, own, watched, sums);
        }
      }
#pragma omp for nowait
      for (int64_t t = 0; t < head.tiles; t++) gather(w, c, head, chunks, at, t);
    }
  }
}
