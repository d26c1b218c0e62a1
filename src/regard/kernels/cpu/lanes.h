// Vectors of floats, as wide as the machine has them, in the compilers' own vector extension.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace regard {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;  // NEON, SSE
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr float kInf = std::numeric_limits<float>::infinity();

// Lane numbers as constants in memory: put together at run time they would cost more than what uses them.
struct LaneNumbers {
  int32_t self[W]{}, low[W]{}, high[W]{}, even[W]{}, odd[W]{}, exchanged[W][W]{};

  constexpr LaneNumbers() {
    for (int i = 0; i < W; ++i) {
      self[i] = i;
      low[i] = i / 2 + (i % 2) * W;
      high[i] = low[i] + W / 2;
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
      for (int distance = 0; distance < W; ++distance) exchanged[distance][i] = i ^ distance;
    }
  }
};
alignas(64) constexpr LaneNumbers kLanes;

inline ivec lane_numbers(const int32_t (&numbers)[W]) {
  ivec x;
  std::memcpy(&x, numbers, sizeof x);
  return x;
}

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }
inline vec splat(float x) { return x - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// x with lane i and lane i ^ distance exchanged.
inline vec exchanged(vec x, int distance) {
#if defined(__clang__)
  vec out;
  for (int i = 0; i < W; ++i) out[i] = x[i ^ distance];
  return out;
#else
  return __builtin_shuffle(x, lane_numbers(kLanes.exchanged[distance]));
#endif
}

inline float sum(vec x) {
#pragma GCC unroll 8
  for (int distance = W / 2; distance; distance /= 2) x += exchanged(x, distance);
  return x[0];
}
inline float largest(vec x) {
#pragma GCC unroll 8
  for (int distance = W / 2; distance; distance /= 2) x = larger(x, exchanged(x, distance));
  return x[0];
}

// Lane i of the result puts all lanes of rows[i] together: W reductions in 2 (W - 1) shuffles, none waiting for another.
template <typename Op>
vec across(vec (&rows)[W], const Op& op) {
#if defined(__clang__)
  vec out;
  for (int i = 0; i < W; ++i) {
    for (int distance = W / 2; distance; distance /= 2) rows[i] = op(rows[i], exchanged(rows[i], distance));
    out[i] = rows[i][0];
  }
  return out;
#else
  const ivec even = lane_numbers(kLanes.even), odd = lane_numbers(kLanes.odd);
#pragma GCC unroll 8
  for (int n = W; n > 1; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i)
      rows[i] = op(__builtin_shuffle(rows[2 * i], rows[2 * i + 1], even),
                   __builtin_shuffle(rows[2 * i], rows[2 * i + 1], odd));
  return rows[0];
#endif
}

inline vec sums_of(vec (&rows)[W]) {
  return across(rows, [](vec a, vec b) { return a + b; });
}

// Lanes [lo, hi) pass (0), the others are masked (-inf): to be added to logits.
inline vec lane_mask(int lo, int hi) {
  const ivec lane = lane_numbers(kLanes.self);
  return (lane >= lo) & (lane < hi) ? vec{} : splat(-kInf);
}

// e^x for x up to 88 with about one unit in the last place; exactly 0 below -87.3; NaN stays NaN.
// Cody-Waite reduction to |r| <= ln(2) / 2, a polynomial of degree 6, and the exponent put together as bits.
inline vec exp(vec x) {
  const vec shift = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec rounded = x * splat(1.44269504f) + shift;
  const vec n = rounded - shift;
  vec r = x - n * splat(0.693145752f);
  r = r - n * splat(1.42860677e-6f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + (r + splat(1.f));
  ivec bits, whole;
  std::memcpy(&bits, &rounded, sizeof bits);
  std::memcpy(&whole, &p, sizeof whole);
  whole = whole + (bits << 23);  // the integer n stands in the low bits of `rounded`
  vec result;
  std::memcpy(&result, &whole, sizeof result);
  return x < splat(-87.3f) ? vec{} : result;
}

// What 2^i / 2^kTableBits is for the lanes i of a vector: rounding an exponent to such steps leaves less to a polynomial.
#if defined(__clang__)
constexpr int kTableBits = 0;  // no shuffle by a variable
#else
constexpr int kTableBits = W == 16 ? 4 : W == 8 ? 3 : 2;
#endif
constexpr int kDegree = kTableBits == 4 ? 3 : kTableBits == 3 ? 4 : kTableBits == 2 ? 5 : 7;

struct PowersOfTwo {
  float root[W]{}, taylor[8]{};  // 2^(i / 2^kTableBits) and ln(2)^k / k!

  constexpr PowersOfTwo() {
    double step = 2, power = 1, term = 1;
    for (int bit = 0; bit < kTableBits; ++bit) {
      const double square = step;
      for (int newton = 0; newton < 8; ++newton) step = (step + square / step) / 2;
    }
    for (int i = 0; i < W; ++i, power *= step) root[i] = static_cast<float>(power);
    for (int k = 0; k < 8; ++k, term *= 0.69314718055994531 / k) taylor[k] = static_cast<float>(term);
  }
};
alignas(64) constexpr PowersOfTwo kPowers;

// 2^(x y) for |x y| < 2^17 with about one unit in the last place: the product is not rounded.
inline vec power_of_two(vec x, vec y) {
  const vec shift = splat(1.5f * (1 << (23 - kTableBits)));  // adding it rounds to a step of the table
  const vec rounded = x * y + shift, n = rounded - shift, r = x * y - n;
  vec p = splat(kPowers.taylor[kDegree]);
#pragma GCC unroll 8
  for (int k = kDegree - 1; k > 0; --k) p = p * r + splat(kPowers.taylor[k]);
  ivec bits;
  std::memcpy(&bits, &rounded, sizeof bits);
#if defined(__clang__)
  p = p * r + splat(1.f);
#else
  const vec root = __builtin_shuffle(load(kPowers.root), bits);  // by the low bits of each lane
  p = root * r * p + root;
#endif
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  ivec whole;
  std::memcpy(&whole, &p, sizeof whole);
  whole = whole + (bits >> kTableBits << 23);
  vec result;
  std::memcpy(&result, &whole, sizeof result);
  return n < splat(-126.f) ? vec{} : n >= splat(128.f) ? splat(kInf) : result;
#endif
}

// ln(x) for normal positive x, and -inf for 0: x = m 2^e with m in [sqrt(1/2), sqrt(2)), then a polynomial in m - 1.
inline vec log(vec x) {
  ivec bits;
  std::memcpy(&bits, &x, sizeof bits);
  const ivec e = (bits - 0x3f3504f3) >> 23;
  bits = bits - (e << 23);
  vec m;
  std::memcpy(&m, &bits, sizeof m);
  const vec r = m - splat(1.f), n = __builtin_convertvector(e, vec);
  vec p = splat(7.0376836292e-2f);
  p = p * r + splat(-1.1514610310e-1f);
  p = p * r + splat(1.1676998740e-1f);
  p = p * r + splat(-1.2420140846e-1f);
  p = p * r + splat(1.4249322787e-1f);
  p = p * r + splat(-1.6668057665e-1f);
  p = p * r + splat(2.0000714765e-1f);
  p = p * r + splat(-2.4999993993e-1f);
  p = p * r + splat(3.3333331174e-1f);
  const vec square = r * r;
  p = p * r * square + n * splat(-2.12194440e-4f) - splat(0.5f) * square;
  const vec value = r + p + n * splat(0.693359375f);
  return x > vec{} ? value : (x == vec{} ? splat(-kInf) : x);
}

// Transpose of W rows in registers: log2(W) perfect shuffles.
inline void transpose(vec (&rows)[W]) {
#if defined(__clang__)
  vec out[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) out[i][j] = rows[j][i];
  for (int i = 0; i < W; ++i) rows[i] = out[i];
#else
  const ivec low = lane_numbers(kLanes.low), high = lane_numbers(kLanes.high);
  vec out[W];
  for (int stage = 1; stage < W; stage *= 2) {
    for (int i = 0; i < W / 2; ++i) {
      out[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      out[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
    for (int i = 0; i < W; ++i) rows[i] = out[i];
  }
#endif
}

inline int padded(int64_t n) { return static_cast<int>((n + W - 1) / W * W); }

}  // namespace regard
