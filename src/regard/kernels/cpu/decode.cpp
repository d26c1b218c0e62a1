#include "decode.h"

namespace regard {
namespace {

constexpr int kBlock = 64;  // keys at a time; a multiple of W
constexpr int kParts = kBlock / W;

}  // namespace

void decode_forward(const DecodeProblem& p, Rows out, float* lse) {
  const int stride = padded(p.width), value_stride = padded(p.value_width);
  const int64_t repeat = p.heads / p.kv_heads, rows = repeat * p.queries;  // rows that share a head's keys
  const int64_t blocks = (p.keys + kBlock - 1) / kBlock;
  const int64_t splits = std::max<int64_t>(1, std::min<int64_t>(blocks, (4 * threads() + p.batch - 1) / p.batch));
  const int64_t all = p.kv_heads * rows;
  // Of each part: the largest logit, the sum of exponentials, the weighted values.
  std::vector<float> most(p.batch * splits * all), total(most.size()), sums(most.size() * value_stride);
  const auto query_of = [&](int64_t row) { return row % p.queries; };

  parallel(p.batch * splits, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / splits, split = item % splits;
      const int64_t first = blocks * split / splits * kBlock, last = std::min(p.keys, blocks * (split + 1) / splits * kBlock);
      memory.reset(static_cast<size_t>(all) * stride + kBlock * (2 * stride + value_stride) +
                   static_cast<size_t>(rows) * kBlock);
      float* q = memory.take(static_cast<size_t>(all) * stride);
      float* k = memory.take(kBlock * stride);
      float* kt = memory.take(kBlock * stride);
      float* packed = memory.take(kBlock * value_stride);
      float* s = memory.take(static_cast<size_t>(rows) * kBlock);
      float *top = &most[item * all], *mass = &total[item * all], *o = &sums[item * all * value_stride];
      std::fill_n(top, all, -kInf);
      for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
        for (int64_t row = 0; row < rows; ++row)
          read(p.q, p.q.at(b, query_of(row), kv_head * repeat + row / p.queries), p.width,
               q + (kv_head * rows + row) * stride, stride, p.scale);
      const bool k_in_place = !p.k.half && stride == p.width, v_in_place = !p.v.half && value_stride == p.value_width;
      for (int64_t start = first; start < last; start += kBlock) {
        const int here = static_cast<int>(std::min<int64_t>(kBlock, last - start)), parts = padded(here) / W;
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
          const float *kt_at[kParts], *v_at[kParts];
          int lo[kParts], hi[kParts];
          for (int g = 0; g < parts; ++g) {
            const float* of_k[W];
            for (int e = 0; e < W; ++e) {
              const int key = g * W + e;
              of_k[e] = k + key * stride;
              if (key >= here) {
                std::fill_n(k + key * stride, stride, 0.f);
                continue;
              }
              const char* from = p.k.at(b, start + key, kv_head);
              if (k_in_place)
                of_k[e] = reinterpret_cast<const float*>(from);
              else
                read(p.k, from, p.width, k + key * stride, stride);
              if (!v_in_place)
                read(p.v, p.v.at(b, start + key, kv_head), p.value_width, packed + key * value_stride, value_stride);
              if (start + key + kBlock < last) {
                foresee(p.k, from + kBlock * p.k.row, p.width);
                foresee(p.v, p.v.at(b, start + key + kBlock, kv_head), p.value_width);
              }
            }
            lanes(of_k, p.width, kt + g * W * stride);
            kt_at[g] = kt + g * W * stride;
            v_at[g] = v_in_place ? reinterpret_cast<const float*>(p.v.at(b, start + g * W, kv_head))
                                 : packed + g * W * value_stride;
            lo[g] = 0;
            hi[g] = std::min(W, here - g * W);
          }
          const int v_row = v_in_place ? static_cast<int>(p.v.row / 4) : value_stride;
          const int lds = parts * W;
          scores(q + kv_head * rows * stride, stride, static_cast<int>(rows), kt_at, parts, p.width, s, lds);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t place = kv_head * rows + row;
            int64_t seen = here;
            if (p.causal) seen = std::min<int64_t>(here, query_of(row) + p.keys - p.queries + 1 - start);
            vec peak = splat(-kInf);
            for (int g = 0; g < parts; ++g) {
              float* to = s + row * lds + g * W;
              if (seen < (g + 1) * W) store(to, load(to) + lane_mask(0, static_cast<int>(seen - g * W)));
              peak = larger(load(to), peak);
            }
            const float now = std::max(top[place], largest(peak)), base = now == -kInf ? 0 : now;
            vec added{};
            for (int g = 0; g < parts; ++g) {
              const vec x = exp(load(s + row * lds + g * W) - splat(base));
              store(s + row * lds + g * W, x);
              added += x;
            }
            const float fade = top[place] == -kInf ? 0 : std::exp(top[place] - base);
            if (fade != 1)
              for (int c = 0; c < value_stride; c += W)
                store(o + place * value_stride + c, load(o + place * value_stride + c) * splat(fade));
            mass[place] = mass[place] * fade + sum(added);
            top[place] = now;
          }
          mix(s, lds, static_cast<int>(rows), {v_at, lo, hi, parts}, value_stride, v_row, o + kv_head * rows * value_stride,
              value_stride, true);
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
