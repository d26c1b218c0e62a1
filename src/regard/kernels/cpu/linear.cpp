#include "linear.h"

namespace regard {
namespace {

constexpr int kChunk = 64;  // tokens; a multiple of W
constexpr int kChunkBlocks = kChunk / W;

// Powers of what remains of a memory after one token.
struct Fading {
  float power[kChunk + 1];
  float inside[2 * kChunk];  // inside[kChunk - 1 - i + j] = power[i - j] for j <= i, else 0

  explicit Fading(float rate) {
    for (int i = 0; i <= kChunk; ++i) power[i] = std::exp(-rate * static_cast<float>(i));
    for (int i = 0; i < 2 * kChunk; ++i) inside[i] = i < kChunk ? power[kChunk - 1 - i] : 0;
  }
};

// x[i] *= factor(i) for rows of `stride` numbers.
template <typename F>
void scale_rows(const float* x, int rows, int stride, float* to, F factor) {
  for (int i = 0; i < rows; ++i) {
    const vec f = splat(factor(i));
    for (int c = 0; c < stride; c += W) store(to + i * stride + c, load(x + i * stride + c) * f);
  }
}

void scale(float* x, size_t n, float factor) {
  const vec f = splat(factor);
  for (size_t i = 0; i < n; i += W) store(x + i, load(x + i) * f);
}

// A memory of `rows` rows, read from and written to its place without padding.
void fetch(const float* from, int rows, int width, int stride, float* to) {
  for (int c = 0; c < rows; ++c)
    for (int e = 0; e < stride; ++e) to[c * stride + e] = from && e < width ? from[c * width + e] : 0;
}
void fetch_transposed(const float* from, int rows, int width, int stride, float* to) {
  for (int e = 0; e < width; ++e)
    for (int c = 0; c < stride; ++c) to[e * stride + c] = from && c < rows ? from[c * width + e] : 0;
}
void put(const float* from, int rows, int width, int stride, float* to) {
  for (int c = 0; c < rows; ++c) std::copy_n(from + c * stride, width, to + c * width);
}

// memory[c] += sum_j x_j[c] y_j for c < width.
void remember(const float* x, int stride, int width, int tokens, const float* y, int y_stride, float* memory) {
  const int lo = 0;
  spread(x, stride, tokens, y, y_stride, &memory, {nullptr, &lo, &width, 1});
}

// o_i (+)= sum_c x_i[c] memory[c].
void recall(const float* x, int stride, int width, int tokens, const float* memory, int y_stride, float* o, bool keep) {
  const int lo = 0;
  mix(x, stride, tokens, {&memory, &lo, &width, 1}, y_stride, y_stride, o, y_stride, keep);
}

// One chunk: q, k and v as rows, k (and v) as lanes, and the causal products among its tokens.
struct Chunk {
  int tokens, stride, value_stride;
  float *q, *k, *v, *kt, *vt, *s, *temporary;
  const float *kt_at[kChunkBlocks], *k_at[kChunkBlocks], *v_at[kChunkBlocks], *vt_at[kChunkBlocks];
  int lo[kChunkBlocks], hi[kChunkBlocks];

  static size_t size(const LinearProblem& p) {
    return static_cast<size_t>(kChunk) * (4 * padded(p.width) + 3 * padded(p.value_width) + kChunk);
  }

  Chunk(const LinearProblem& p, Scratch& memory) {
    stride = padded(p.width);
    value_stride = padded(p.value_width);
    q = memory.take(kChunk * stride);
    k = memory.take(kChunk * stride);
    kt = memory.take(kChunk * stride);
    v = memory.take(kChunk * value_stride);
    vt = memory.take(kChunk * value_stride);
    s = memory.take(kChunk * kChunk);
    temporary = memory.take(kChunk * std::max(stride, value_stride));
    for (int g = 0; g < kChunkBlocks; ++g) {
      kt_at[g] = kt + g * W * stride;
      vt_at[g] = vt + g * W * value_stride;
      k_at[g] = k + g * W * stride;
      v_at[g] = v + g * W * value_stride;
      lo[g] = 0;
    }
  }

  void read_tokens(const LinearProblem& p, int64_t b, int64_t start, int64_t head, bool value_lanes) {
    const int64_t kv_head = head / (p.heads / p.kv_heads);
    tokens = static_cast<int>(std::min<int64_t>(kChunk, p.length - start));
    for (int i = 0; i < kChunk; ++i) {
      if (i < tokens) {
        read(p.q, p.q.at(b, start + i, head), p.width, q + i * stride, stride);
        read(p.k, p.k.at(b, start + i, kv_head), p.width, k + i * stride, stride);
        read(p.v, p.v.at(b, start + i, kv_head), p.value_width, v + i * value_stride, value_stride);
        if (start + i + kChunk < p.length) {
          foresee(p.q, p.q.at(b, start + i + kChunk, head), p.width);
          foresee(p.k, p.k.at(b, start + i + kChunk, kv_head), p.width);
          foresee(p.v, p.v.at(b, start + i + kChunk, kv_head), p.value_width);
        }
      } else {
        std::fill_n(q + i * stride, stride, 0.f);
        std::fill_n(k + i * stride, stride, 0.f);
        std::fill_n(v + i * value_stride, value_stride, 0.f);
      }
    }
    for (int g = 0; g < kChunkBlocks; ++g) {
      const float *of_k[W], *of_v[W];
      for (int e = 0; e < W; ++e) {
        of_k[e] = k_at[g] + e * stride;
        of_v[e] = v_at[g] + e * value_stride;
      }
      lanes(of_k, p.width, kt + g * W * stride);
      if (value_lanes) lanes(of_v, p.value_width, vt + g * W * value_stride);
    }
  }

  // s[i][j] = (x_i . lane j + extra[i]) power[i - j] for j <= i: rows W at a time, which see the blocks up to their own.
  void products(const float* x, int x_stride, const float* const* at, int width, const Fading& fading,
                const float* extra) {
    for (int g = 0; g * W < tokens; ++g) {
      const int here = std::min(W, tokens - g * W);
      scores(x + g * W * x_stride, x_stride, here, at, g + 1, width, s + g * W * kChunk, kChunk);
      for (int i = g * W; i < g * W + here; ++i) {
        const vec more = splat(extra ? extra[i] : 0.f);
        for (int block = 0; block <= g; ++block) {
          float* to = s + i * kChunk + block * W;
          store(to, (load(to) + more) * load(fading.inside + kChunk - 1 - i + block * W));
        }
      }
    }
  }

  // o_i (+)= sum_j s[i][j] rows_j.
  void mix_causal(const float* const* rows, int columns, float* o, bool keep) {
    for (int g = 0; g * W < tokens; ++g) {
      const int here = std::min(W, tokens - g * W);
      for (int block = 0; block <= g; ++block) hi[block] = std::min(W, tokens - block * W);
      mix(s + g * W * kChunk, kChunk, here, {rows, lo, hi, g + 1}, columns, columns, o + g * W * columns, columns, keep);
    }
  }

  // y_j += sum_i s[i][j] x_i.
  void spread_causal(const float* x, int columns, float* y) {
    for (int g = 0; g * W < tokens; ++g) {
      const int here = std::min(W, tokens - g * W);
      float* at[kChunkBlocks];
      for (int block = 0; block <= g; ++block) {
        at[block] = y + block * W * columns;
        hi[block] = std::min(W, tokens - block * W);
      }
      spread(s + g * W * kChunk, kChunk, here, x + g * W * columns, columns, at, {nullptr, lo, hi, g + 1});
    }
  }

  float row_sum(int i) const {
    vec total{};
    for (int block = 0; block <= i / W; ++block) total += load(s + i * kChunk + block * W);
    return sum(total);
  }
};

}  // namespace

void linear_forward(const LinearProblem& p, LinearMemory before, Rows out, float* totals, LinearMemory after) {
  const int stride = padded(p.width), value_stride = padded(p.value_width);
  parallel(p.batch * p.heads, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.heads, head = item % p.heads;
      memory.reset(Chunk::size(p) + static_cast<size_t>(p.width) * value_stride + stride +
                   kChunk * std::max(stride, value_stride) + static_cast<size_t>(kChunk) * value_stride);
      Chunk chunk(p, memory);
      float* state = memory.take(static_cast<size_t>(p.width) * value_stride);
      float* sums = memory.take(stride);
      float* o = memory.take(kChunk * value_stride);
      fetch(before.kv ? before.kv + item * p.width * p.value_width : nullptr, p.width, p.value_width, value_stride, state);
      fetch(before.k ? before.k + item * p.width : nullptr, 1, p.width, stride, sums);
      const Fading fading(p.decay ? p.decay[head] : 0.f);
      for (int64_t start = 0; start < p.length; start += kChunk) {
        chunk.read_tokens(p, b, start, head, false);
        const int tokens = chunk.tokens;
        chunk.products(chunk.q, stride, chunk.kt_at, p.width, fading, nullptr);
        chunk.mix_causal(chunk.v_at, value_stride, o, false);
        scale_rows(chunk.q, tokens, stride, chunk.temporary, [&](int i) { return fading.power[i + 1]; });
        recall(chunk.temporary, stride, p.width, tokens, state, value_stride, o, true);
        for (int i = 0; i < tokens; ++i) {
          float factor = 1;
          if (p.normalize) {
            const float total = chunk.row_sum(i) + dot(chunk.temporary + i * stride, sums, stride) + p.eps;
            if (totals) totals[(b * p.length + start + i) * p.heads + head] = total;
            factor = 1.f / total;
          }
          write(out, out.at(b, start + i, head), p.value_width, o + i * value_stride, factor);
        }
        scale_rows(chunk.k, tokens, stride, chunk.temporary, [&](int i) { return fading.power[tokens - 1 - i]; });
        scale(state, static_cast<size_t>(p.width) * value_stride, fading.power[tokens]);
        scale(sums, stride, fading.power[tokens]);
        remember(chunk.temporary, stride, p.width, tokens, chunk.v, value_stride, state);
        for (int i = 0; i < tokens; ++i)
          for (int c = 0; c < stride; c += W) store(sums + c, load(sums + c) + load(chunk.temporary + i * stride + c));
      }
      if (after.kv) put(state, p.width, p.value_width, value_stride, after.kv + item * p.width * p.value_width);
      if (after.k) put(sums, 1, p.width, stride, after.k + item * p.width);
    }
  });
}

void linear_backward(const LinearProblem& p, LinearMemory before, Rows out, const float* totals, Rows out_gradient,
                     LinearMemory after_gradient, Rows dq, Rows dk, Rows dv, LinearMemory before_gradient) {
  const int stride = padded(p.width), value_stride = padded(p.value_width);
  const int64_t repeat = p.heads / p.kv_heads;
  const size_t memory_size = static_cast<size_t>(p.width) * value_stride, turned_size = static_cast<size_t>(p.value_width) * stride;
  parallel(p.batch * p.kv_heads, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin * repeat; item < end * repeat; ++item) {  // heads that share keys: one after the other
      const int64_t b = item / p.heads, head = item % p.heads, kv_head = head / repeat;
      memory.reset(Chunk::size(p) + kChunk * std::max(stride, value_stride) + memory_size + turned_size + stride +
                   static_cast<size_t>(kChunk) * (2 * stride + 2 * value_stride + 1));
      Chunk chunk(p, memory);
      float* state = memory.take(memory_size);    // (width, value_width)
      float* turned = memory.take(turned_size);   // (value_width, width)
      float* sums = memory.take(stride);
      float* go = memory.take(kChunk * value_stride);
      float* o = memory.take(kChunk * value_stride);
      float* x = memory.take(kChunk * stride);
      float* total_gradient = memory.take(kChunk);
      const Fading fading(p.decay ? p.decay[head] : 0.f);

      // out = number / total: gradients of number into `go`, of total into `total_gradient`.
      const auto read_gradients = [&](int64_t start) {
        for (int i = 0; i < chunk.tokens; ++i) {
          const int64_t place = (b * p.length + start + i) * p.heads + head;
          read(out_gradient, out_gradient.at(b, start + i, head), p.value_width, go + i * value_stride, value_stride,
               p.normalize ? 1.f / totals[place] : 1.f);
          total_gradient[i] = 0;
          if (p.normalize) {
            read(out, out.at(b, start + i, head), p.value_width, o + i * value_stride, value_stride);
            total_gradient[i] = -dot(go + i * value_stride, o + i * value_stride, value_stride);
          }
        }
      };

      // Forwards in time: dq, from what the tokens before have left.
      fetch_transposed(before.kv ? before.kv + item * p.width * p.value_width : nullptr, p.width, p.value_width, stride, turned);
      fetch(before.k ? before.k + item * p.width : nullptr, 1, p.width, stride, sums);
      for (int64_t start = 0; start < p.length; start += kChunk) {
        chunk.read_tokens(p, b, start, head, true);
        read_gradients(start);
        const int tokens = chunk.tokens;
        recall(go, value_stride, p.value_width, tokens, turned, stride, x, false);
        for (int i = 0; i < tokens; ++i) {
          const vec factor = splat(fading.power[i + 1]), more = splat(total_gradient[i]);
          for (int c = 0; c < stride; c += W)
            store(x + i * stride + c, factor * (load(x + i * stride + c) + more * load(sums + c)));
        }
        chunk.products(go, value_stride, chunk.vt_at, p.value_width, fading, total_gradient);
        chunk.mix_causal(chunk.k_at, stride, x, true);
        for (int i = 0; i < tokens; ++i) write(dq, dq.at(b, start + i, head), p.width, x + i * stride);
        scale_rows(chunk.k, tokens, stride, chunk.temporary, [&](int i) { return fading.power[tokens - 1 - i]; });
        scale(turned, turned_size, fading.power[tokens]);
        scale(sums, stride, fading.power[tokens]);
        remember(chunk.v, value_stride, p.value_width, tokens, chunk.temporary, stride, turned);
        for (int i = 0; i < tokens; ++i)
          for (int c = 0; c < stride; c += W) store(sums + c, load(sums + c) + load(chunk.temporary + i * stride + c));
      }

      // Backwards in time: dk and dv, from what the tokens after ask for.
      const float* asked = after_gradient.kv ? after_gradient.kv + item * p.width * p.value_width : nullptr;
      fetch(asked, p.width, p.value_width, value_stride, state);
      fetch_transposed(asked, p.width, p.value_width, stride, turned);
      fetch(after_gradient.k ? after_gradient.k + item * p.width : nullptr, 1, p.width, stride, sums);
      for (int64_t start = (p.length - 1) / kChunk * kChunk; start >= 0; start -= kChunk) {
        chunk.read_tokens(p, b, start, head, true);
        read_gradients(start);
        const int tokens = chunk.tokens;
        const auto left = [&](int j) { return fading.power[tokens - 1 - j]; };
        // dv_j = sum_c k_j[c] state[c] + sum_i s_ij go_i
        scale_rows(chunk.k, tokens, stride, chunk.temporary, left);
        recall(chunk.temporary, stride, p.width, tokens, state, value_stride, o, false);
        chunk.products(chunk.q, stride, chunk.kt_at, p.width, fading, nullptr);
        chunk.spread_causal(go, value_stride, o);
        for (int j = 0; j < tokens; ++j) add(dv.at(b, start + j, kv_head), p.value_width, o + j * value_stride);
        // dk_j = sum_e v_j[e] turned[e] + sums + sum_i ds_ij q_i
        recall(chunk.v, value_stride, p.value_width, tokens, turned, stride, x, false);
        for (int j = 0; j < tokens; ++j) {
          const vec factor = splat(left(j));
          for (int c = 0; c < stride; c += W)
            store(x + j * stride + c, factor * (load(x + j * stride + c) + load(sums + c)));
        }
        chunk.products(go, value_stride, chunk.vt_at, p.value_width, fading, total_gradient);
        chunk.spread_causal(chunk.q, stride, x);
        for (int j = 0; j < tokens; ++j) add(dk.at(b, start + j, kv_head), p.width, x + j * stride);
        scale_rows(chunk.q, tokens, stride, chunk.temporary, [&](int i) { return fading.power[i + 1]; });
        scale(state, memory_size, fading.power[tokens]);
        scale(turned, turned_size, fading.power[tokens]);
        scale(sums, stride, fading.power[tokens]);
        remember(chunk.temporary, stride, p.width, tokens, go, value_stride, state);
        remember(go, value_stride, p.value_width, tokens, chunk.temporary, stride, turned);
        for (int i = 0; i < tokens; ++i) {
          const vec factor = splat(total_gradient[i]);
          for (int c = 0; c < stride; c += W)
            store(sums + c, load(sums + c) + factor * load(chunk.temporary + i * stride + c));
        }
      }
      if (before_gradient.kv)
        put(state, p.width, p.value_width, value_stride, before_gradient.kv + item * p.width * p.value_width);
      if (before_gradient.k) put(sums, 1, p.width, stride, before_gradient.k + item * p.width);
    }
  });
}

}  // namespace regard
