// The three small products that every kernel of this folder is made of, and the rows they work on.
//
// Keys are packed in blocks of W, one lane a key: `kt[d][W]` for logits, `rows[W][stride]` for weighted sums. A strip is
// a few queries against a list of such blocks; its logits stand in `s[query][block][W]`.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "lanes.h"

namespace regard {

// Runs body(first, last, part) over `parts` parts of [0, n), in PyTorch's threads: a thread that is done takes the next
// part, so that none waits long for another. What a part is hangs on n and `parts` only: sums by part have one order.
void parallel(int64_t n, int64_t parts, const std::function<void(int64_t, int64_t, int64_t)>& body);
int threads();
constexpr int kParts = 16;  // for each thread: few enough that taking one costs nothing

// How many parts of n where each keeps `numbers` sums of its own: fewer where those would fill memory.
inline int64_t parts_with(int64_t n, int64_t numbers) {
  return std::min(n, threads() * std::clamp<int64_t>((1 << 18) / std::max<int64_t>(numbers, 1), 1, kParts));
}

inline void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  parallel(n, kParts * threads(), [&](int64_t first, int64_t last, int64_t) { body(first, last); });
}
bool poison();  // PyTorch was told to fill fresh memory (torch.utils.deterministic.fill_uninitialized_memory)

// A tensor (batch, rows, heads, width) in float32 or bfloat16; neighbouring channels are neighbours in memory.
struct Rows {
  char* data;
  bool half;
  int64_t batch, row, head;  // strides in bytes

  char* at(int64_t b, int64_t n, int64_t h) const { return data + b * batch + n * row + h * head; }
};

inline float wide(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t narrow(float value) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Rows that belong together lie far apart, where no hardware foresees them: asked for one group ahead.
inline void foresee(const Rows& from, const char* row, int width) {
  const int bytes = width * (from.half ? 2 : 4);
  for (int offset = 0; offset < bytes; offset += 64) __builtin_prefetch(row + offset, 0, 3);
}

// `to[0:width] = scale * row`, zeros up to `stride`.
inline void read(const Rows& from, const char* row, int width, float* to, int stride, float scale = 1.f) {
  int c = 0;
  if (from.half) {
    const auto* x = reinterpret_cast<const uint16_t*>(row);
    for (; c < width; ++c) to[c] = scale * wide(x[c]);
  } else {
    const auto* x = reinterpret_cast<const float*>(row);
    const vec factor = splat(scale);
    for (; c + W <= width; c += W) store(to + c, load(x + c) * factor);
    for (; c < width; ++c) to[c] = scale * x[c];
  }
  for (; c < stride; ++c) to[c] = 0;
}

inline void write(const Rows& to, char* row, int width, const float* from, float scale = 1.f) {
  int c = 0;
  if (to.half) {
    auto* y = reinterpret_cast<uint16_t*>(row);
    for (; c < width; ++c) y[c] = narrow(scale * from[c]);
  } else {
    auto* y = reinterpret_cast<float*>(row);
    const vec factor = splat(scale);
    for (; c + W <= width; c += W) store(y + c, load(from + c) * factor);
    for (; c < width; ++c) y[c] = scale * from[c];
  }
}

// `row[0:width] += from`, float32 only: gradients are summed in full precision.
inline void add(char* row, int width, const float* from) {
  auto* y = reinterpret_cast<float*>(row);
  int c = 0;
  for (; c + W <= width; c += W) store(y + c, load(y + c) + load(from + c));
  for (; c < width; ++c) y[c] += from[c];
}

// Rows to lanes: `kt[width][W]`. Rows are read a vector at a time, so they need width rounded up to W.
inline void lanes(const float* const (&rows)[W], int width, float* kt) {
  vec block[W];
  for (int c = 0; c < width; c += W) {
    for (int e = 0; e < W; ++e) block[e] = load(rows[e] + c);
    transpose(block);
    const int n = std::min(W, width - c);
    for (int e = 0; e < n; ++e) store(kt + (c + e) * W, block[e]);
  }
}

// Memory of a thread that grows and is kept; 64-byte aligned.
class Scratch {
 public:
  float* take(size_t n) {
    n = (n + 15) / 16 * 16;
    if (used_ + n > size_) throw std::bad_alloc();
    float* p = start_ + used_;
    used_ += n;
    return p;
  }
  template <typename T>
  T* take_of(size_t n) {  // T no larger than two floats
    return reinterpret_cast<T*>(take(2 * n));
  }
  size_t mark() const { return used_; }
  void back_to(size_t mark) { used_ = mark; }  // gives up what was taken since
  void reset(size_t n) {
    n += 32 * 16;  // room to align each of the parts
    if (n > size_) {
      memory_.reset(new char[4 * n + 64]);
      start_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
      size_ = n;
    }
    used_ = 0;
    if (poison()) std::fill_n(start_, n, std::numeric_limits<float>::quiet_NaN());
  }

 private:
  std::unique_ptr<char[]> memory_;
  float* start_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

inline Scratch& scratch() {
  thread_local Scratch mine;
  return mine;
}

#if defined(__AVX512F__)
constexpr int kRows = 8, kBlocks = 4, kWidth = 4, kSums = 28;  // of 32 registers
#elif defined(__AVX__)
constexpr int kRows = 6, kBlocks = 4, kWidth = 4, kSums = 12;  // of 16 registers
#else
constexpr int kRows = 6, kBlocks = 4, kWidth = 4, kSums = 24;  // NEON has 32 registers
#endif

// One list of blocks: where each starts, and which of its lanes hold keys that this strip may see.
struct Blocks {
  const float* const* at;
  const int* lo;
  const int* hi;
  int count;
};

template <int M, int N>
void scores_tile(const float* q, int ldq, const float* const* kt, int width, const float* more, int ldm, float* s,
                 int lds) {
  vec sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < N; ++g) sums[i][g] = vec{};
  for (int c = 0; c < width; ++c) {
    vec k[N];
#pragma GCC unroll 4
    for (int g = 0; g < N; ++g) k[g] = load(kt[g] + c * W);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const vec x = splat(q[i * ldq + c]);
#pragma GCC unroll 4
      for (int g = 0; g < N; ++g) sums[i][g] += x * k[g];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < N; ++g)
      store(s + i * lds + g * W, more ? sums[i][g] + load(more + i * ldm + g * W) : sums[i][g]);
}

template <int M, int N>
void mix_tile(const float* p, int ldp, int step, const Blocks& v, int column, int stride, float* o, int ldo, bool keep) {
  vec sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[i][n] = keep ? load(o + i * ldo + n * W) : vec{};
  for (int g = 0; g < v.count; ++g) {
    const float* weights = p + g * W * step;
    const float* rows = v.at[g] + column;
    for (int e = v.lo[g]; e < v.hi[g]; ++e) {
      vec y[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) y[n] = load(rows + e * stride + n * W);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const vec x = splat(weights[i * ldp + e * step]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[i][n] += x * y[n];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(o + i * ldo + n * W, sums[i][n]);
}

using ScoresTile = void (*)(const float*, int, const float* const*, int, const float*, int, float*, int);
using MixTile = void (*)(const float*, int, int, const Blocks&, int, int, float*, int, bool);

template <int... I>
ScoresTile scores_of(int m, int n, std::integer_sequence<int, I...>) {
  static constexpr ScoresTile tiles[] = {scores_tile<I / kBlocks + 1, I % kBlocks + 1>...};
  return tiles[(m - 1) * kBlocks + n - 1];
}
template <int... I>
MixTile mix_of(int m, int n, std::integer_sequence<int, I...>) {
  static constexpr MixTile tiles[] = {mix_tile<I / kWidth + 1, I % kWidth + 1>...};
  return tiles[(m - 1) * kWidth + n - 1];
}

// `total` in as few parts of at most `most` as can be, which differ by one at the most: small tiles are slow.
struct Parts {
  int count, size, larger;  // `larger` parts of size + 1, then count - larger of `size`

  Parts(int total, int most) {
    count = (total + most - 1) / most;
    size = count ? total / count : 0;
    larger = count ? total % count : 0;
  }
  int of(int part) const { return size + (part < larger); }
};

inline int rows_beside(int columns) { return std::min(kRows, kSums / columns); }

// s[i][g][lane] = q_i . k of every lane of every block, plus more[i][g][lane] where there is more.
inline void scores(const float* q, int ldq, int rows, const float* const* kt, int blocks, int width, float* s, int lds,
                   const float* more = nullptr, int ldm = 0) {
  const Parts across(blocks, kBlocks);
  for (int a = 0, g = 0; a < across.count; g += across.of(a++)) {
    const Parts down(rows, rows_beside(across.of(a)));
    for (int d = 0, i = 0; d < down.count; i += down.of(d++))
      scores_of(down.of(d), across.of(a), std::make_integer_sequence<int, kRows * kBlocks>{})(
          q + i * ldq, ldq, kt + g, width, more ? more + i * ldm + g * W : nullptr, ldm, s + i * lds + g * W, lds);
  }
}

// o_i = sum over the lanes in play of p[i][g][lane] v (added to o_i if `keep`), `width` columns of it, a multiple of W.
inline void mix(const float* p, int lds, int rows, const Blocks& v, int width, int stride, float* o, int ldo,
                bool keep = false) {
  const Parts across(width / W, kWidth);
  for (int a = 0, c = 0; a < across.count; c += across.of(a++)) {
    const Parts down(rows, rows_beside(across.of(a)));
    for (int d = 0, i = 0; d < down.count; i += down.of(d++))
      mix_of(down.of(d), across.of(a), std::make_integer_sequence<int, kRows * kWidth>{})(
          p + i * lds, lds, 1, v, c * W, stride, o + i * ldo + c * W, ldo, keep);
  }
}

// y[g][lane] += sum_i p[i][g][lane] x_i, for the lanes in play: the transpose of `mix`.
inline void spread(const float* p, int lds, int rows, const float* x, int stride, float* const* y, const Blocks& lanes) {
  const Parts across(stride / W, kWidth);
  const int lo = 0;
  const Blocks queries{&x, &lo, &rows, 1};
  for (int g = 0; g < lanes.count; ++g) {
    if (lanes.hi[g] <= lanes.lo[g]) continue;
    for (int a = 0, c = 0; a < across.count; c += across.of(a++)) {
      const Parts down(lanes.hi[g] - lanes.lo[g], rows_beside(across.of(a)));
      for (int d = 0, e = lanes.lo[g]; d < down.count; e += down.of(d++))
        mix_of(down.of(d), across.of(a), std::make_integer_sequence<int, kRows * kWidth>{})(
            p + g * W + e, 1, lds, queries, c * W, stride, y[g] + e * stride + c * W, stride, true);
    }
  }
}

// In place: s -> exp(s - max) for each row; also each row's sum and log-sum-exp.
inline void softmax_rows(float* s, int lds, int rows, int blocks, float* totals, float* lse) {
  for (int first = 0; first < rows; first += W) {
    const int here = std::min(W, rows - first);
    float* part = s + first * lds;
    vec each[W];
    for (int i = 0; i < here; ++i) {
      each[i] = load(part + i * lds);
      for (int g = 1; g < blocks; ++g) each[i] = larger(load(part + i * lds + g * W), each[i]);
    }
    for (int i = here; i < W; ++i) each[i] = vec{};
    const vec most = across(each, larger);
    const vec base = most == splat(-kInf) ? vec{} : most;
    float shift[W], total[W], logs[W];
    store(shift, base);
    for (int i = 0; i < here; ++i) {
      float* row = part + i * lds;
      vec sums{};
      for (int g = 0; g < blocks; ++g) {
        const vec x = exp(load(row + g * W) - splat(shift[i]));
        store(row + g * W, x);
        sums += x;
      }
      each[i] = sums;
    }
    for (int i = here; i < W; ++i) each[i] = splat(1);
    const vec sums = sums_of(each);
    store(total, sums);
    store(logs, base + log(sums));
    std::copy_n(total, here, totals + first);
    std::copy_n(logs, here, lse + first);
  }
}

// In place, for each row: s -> p = exp(s - lse), and dp -> p (dp - sum of p dp + lse_gradient).
inline void softmax_gradient_rows(float* s, float* dp, int lds, int rows, int blocks, const float* lse,
                                  const float* lse_gradient = nullptr) {
  for (int first = 0; first < rows; first += W) {
    const int here = std::min(W, rows - first);
    vec each[W];
    for (int i = 0; i < here; ++i) {
      const int64_t row = static_cast<int64_t>(first + i) * lds;
      const vec shift = splat(lse[first + i]);
      vec inner{};
      for (int g = 0; g < blocks; ++g) {
        const vec x = exp(load(s + row + g * W) - shift);
        store(s + row + g * W, x);
        inner += x * load(dp + row + g * W);
      }
      each[i] = inner;
    }
    for (int i = here; i < W; ++i) each[i] = vec{};
    float inner[W];
    store(inner, sums_of(each));
    for (int i = 0; i < here; ++i) {
      const int64_t row = static_cast<int64_t>(first + i) * lds;
      const vec delta = splat(lse_gradient ? inner[i] - lse_gradient[first + i] : inner[i]);
      for (int g = 0; g < blocks; ++g)
        store(dp + row + g * W, load(s + row + g * W) * (load(dp + row + g * W) - delta));
    }
  }
}

inline float dot(const float* a, const float* b, int stride) {
  vec sums{};
  for (int c = 0; c < stride; c += W) sums += load(a + c) * load(b + c);
  return sum(sums);
}

}  // namespace regard
