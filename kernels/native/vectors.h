// Vectors of 16 floats, which compilers cut to what a machine has; entries of keys and values as floats.
// KIND: 0 float32, 1 bfloat16, 2 float16.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
constexpr float INF = std::numeric_limits<float>::infinity();

#if KIND == 1  // bfloat16
typedef uint16_t Entry;
typedef uint16_t Entries __attribute__((vector_size(2 * LANES)));
typedef uint32_t Wide __attribute__((vector_size(4 * LANES)));
inline Floats numbers(Entries x) { return (Floats)(__builtin_convertvector(x, Wide) << 16); }
#elif KIND == 2  // float16
typedef _Float16 Entry;
typedef _Float16 Entries __attribute__((vector_size(2 * LANES)));
inline Floats numbers(Entries x) { return __builtin_convertvector(x, Floats); }
#else
typedef float Entry;
typedef Floats Entries;
inline Floats numbers(Entries x) { return x; }
#endif

inline Floats load(const Entry* at) {
  Entries x;
  std::memcpy(&x, at, sizeof x);
  return numbers(x);
}
inline Floats load_some(const Entry* at, int n) {
  if (n == LANES) return load(at);
  Entry some[LANES] = {};
  std::memcpy(some, at, n * sizeof(Entry));
  return load(some);
}
inline Floats floats(const float* at) {
  Floats x;
  std::memcpy(&x, at, sizeof x);
  return x;
}
inline void put(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

constexpr int blocks(int n) { return (n + LANES - 1) / LANES; }
template <int N> inline Floats block(const Entry* row, int b) {
  return (b + 1) * LANES <= N ? load(row + b * LANES) : load_some(row + b * LANES, N - b * LANES);
}

// Sums of 16 vectors' lanes, as one vector.
inline Floats sums(Floats* t) {
  for (int i = 0; i < 8; i++)
    t[i] = __builtin_shufflevector(t[i], t[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(t[i], t[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    t[i] = __builtin_shufflevector(t[i], t[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(t[i], t[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    t[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(t[i], t[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(t[0], t[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(t[0], t[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// e^x for x <= 0, to 2 units in the last place (the polynomial is Cephes' expf); 0 below -87.
inline Floats exp_of(Floats x) {
  const Floats low = x < -87.0f ? Floats{} - 87.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: its sum with a number rounds that to an integer
  Floats z = low * 1.44269504088896341f + shift;
  Ints power = (Ints)z - 0x4B400000;
  Floats n = z - shift;
  Floats r = low - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  Floats y = p * (r * r) + r + 1.0f;
  Floats e = (Floats)((Ints)y + (power << 23));
  return x < -87.0f ? Floats{} : e;
}

}  // namespace
