#include "decode.h"

namespace regard {
namespace {

constexpr int kFewRows = 4;  // up to so many queries, turning keys into lanes costs more than it saves

// The products of one query with W keys: a sum a key, then all of them turned into one vector.
vec dots(const float* q, const float* const (&rows)[W], int stride) {
  vec sums[W];
  for (int e = 0; e < W; ++e) {
    vec x{};
    for (int c = 0; c < stride; c += W) x += load(q + c) * load(rows[e] + c);
    sums[e] = x;
  }
  transpose(sums);
  vec total = sums[0];
  for (int e = 1; e < W; ++e) total += sums[e];
  return total;
}

}  // namespace

void decode_forward(const DecodeProblem& p, Rows out, float* lse) {
  const int stride = padded(p.width), value_stride = padded(p.value_width);
  const int64_t repeat = p.heads / p.kv_heads, rows = repeat * p.queries;  // rows that share a head's keys
  const int64_t blocks = (p.keys + W - 1) / W;
  const int64_t splits = std::max<int64_t>(1, std::min<int64_t>(blocks, (4 * threads() + p.batch - 1) / p.batch));
  const int64_t all = p.kv_heads * rows;
  // Of each part: the largest logit, the sum of exponentials, the weighted values.
  std::vector<float> most(p.batch * splits * all), total(most.size()), sums(most.size() * value_stride);
  const auto query_of = [&](int64_t row) { return row % p.queries; };

  parallel(p.batch * splits, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / splits, split = item % splits;
      const int64_t first = blocks * split / splits * W, last = std::min(p.keys, blocks * (split + 1) / splits * W);
      memory.reset(static_cast<size_t>(all) * stride + W * (2 * stride + value_stride) + static_cast<size_t>(rows) * W);
      float* q = memory.take(static_cast<size_t>(all) * stride);
      float* k = memory.take(W * stride);
      float* kt = memory.take(W * stride);
      float* packed = memory.take(W * value_stride);
      float* s = memory.take(static_cast<size_t>(rows) * W);
      float *top = &most[item * all], *mass = &total[item * all], *o = &sums[item * all * value_stride];
      std::fill_n(top, all, -kInf);
      for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
        for (int64_t row = 0; row < rows; ++row)
          read(p.q, p.q.at(b, query_of(row), kv_head * repeat + row / p.queries), p.width,
               q + (kv_head * rows + row) * stride, stride, p.scale);
      const bool k_in_place = !p.k.half && stride == p.width, v_in_place = !p.v.half && value_stride == p.value_width;
      // A few keys at a time and all heads of them: memory is then read as W streams that run on.
      for (int64_t start = first; start < last; start += W) {
        const int here = static_cast<int>(std::min<int64_t>(W, last - start));
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
          const float* of_k[W];
          for (int e = 0; e < W; ++e) {
            of_k[e] = k + e * stride;
            if (e >= here) {
              std::fill_n(k + e * stride, stride, 0.f);
              continue;
            }
            const char* from = p.k.at(b, start + e, kv_head);
            if (k_in_place)
              of_k[e] = reinterpret_cast<const float*>(from);
            else
              read(p.k, from, p.width, k + e * stride, stride);
            if (!v_in_place)
              read(p.v, p.v.at(b, start + e, kv_head), p.value_width, packed + e * value_stride, value_stride);
            if (start + e + 2 * W < last) {
              foresee(p.k, from + 2 * W * p.k.row, p.width);
              foresee(p.v, p.v.at(b, start + e + 2 * W, kv_head), p.value_width);
            }
          }
          const float* queries = q + kv_head * rows * stride;
          if (rows <= kFewRows) {
            for (int64_t row = 0; row < rows; ++row) store(s + row * W, dots(queries + row * stride, of_k, stride));
          } else {
            lanes(of_k, p.width, kt);
            scores(queries, stride, static_cast<int>(rows), &kt, 1, p.width, s, W);
          }
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t place = kv_head * rows + row;
            int64_t seen = here;
            if (p.causal) seen = std::min<int64_t>(here, query_of(row) + p.keys - p.queries + 1 - start);
            vec x = load(s + row * W);
            if (seen < W) x += lane_mask(0, static_cast<int>(seen));
            const float now = std::max(top[place], largest(x)), base = now == -kInf ? 0 : now;
            x = exp(x - splat(base));
            store(s + row * W, x);
            if (now > top[place]) {
              const float fade = top[place] == -kInf ? 0 : std::exp(top[place] - base);
              for (int c = 0; c < value_stride; c += W)
                store(o + place * value_stride + c, load(o + place * value_stride + c) * splat(fade));
              mass[place] *= fade;
              top[place] = now;
            }
            mass[place] += sum(x);
          }
          const float* values = v_in_place ? reinterpret_cast<const float*>(p.v.at(b, start, kv_head)) : packed;
          const int lo = 0, v_row = v_in_place ? static_cast<int>(p.v.row / 4) : value_stride;
          mix(s, W, static_cast<int>(rows), {&values, &lo, &here, 1}, value_stride, v_row,
              o + kv_head * rows * value_stride, value_stride, true);
        }
      }
    }
  });

  parallel(p.batch * all, [&](int64_t begin, int64_t end) {
    std::vector<float> o(value_stride);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / all, place = item % all, kv_head = place / rows, row = place % rows;
      const auto at = [&](int64_t split) { return (b * splits + split) * all + place; };
      float peak = -kInf, mass = 0;
      for (int64_t split = 0; split < splits; ++split) peak = std::max(peak, most[at(split)]);
      std::fill(o.begin(), o.end(), 0.f);
      for (int64_t split = 0; split < splits && peak > -kInf; ++split) {
        const float factor = std::exp(most[at(split)] - peak);
        mass += factor * total[at(split)];
        for (int c = 0; c < value_stride; ++c) o[c] += factor * sums[at(split) * value_stride + c];
      }
      const int64_t head = kv_head * repeat + row / p.queries, query = query_of(row);
      lse[(b * p.queries + query) * p.heads + head] = peak > -kInf ? peak + std::log(mass) : -kInf;
      write(out, out.at(b, query, head), p.value_width, o.data(), mass > 0 ? 1.f / mass : 0.f);
    }
  });
}

}  // namespace regard
