#include "decode.h"

namespace regard {
namespace {

constexpr int kFewRows = 4;  // up to so many queries, turning keys into lanes costs more than it saves

// How the work is cut: parts of the keys, and rows (a query of a head) that share the keys of a head.
struct Cut {
  int stride, value_stride;
  int64_t repeat, rows, all, blocks, splits;

  explicit Cut(const DecodeProblem& p) : stride(padded(p.width)), value_stride(padded(p.value_width)) {
    repeat = p.heads / p.kv_heads;
    rows = repeat * p.queries;
    all = p.kv_heads * rows;
    blocks = (p.keys + W - 1) / W;
    splits = std::max<int64_t>(1, std::min<int64_t>(blocks, (4 * threads() + p.batch - 1) / p.batch));
  }
  int64_t first(int64_t split) const { return blocks * split / splits * W; }
  int64_t last(const DecodeProblem& p, int64_t split) const { return std::min(p.keys, first(split + 1)); }
  int64_t head(const DecodeProblem& p, int64_t place) const { return place / rows * repeat + place % rows / p.queries; }
  int64_t query(const DecodeProblem& p, int64_t place) const { return place % rows % p.queries; }
};

// W keys of one head and their values: where they lie in memory if they can be used as they are, or a copy.
class Keys {
 public:
  const float *k_rows[W], *v_rows[W];  // zeros behind the last key
  int here, k_apart, v_apart;          // numbers between a row and the next

  static size_t size(const Cut& cut) { return (W + 1) * (cut.stride + cut.value_stride); }

  Keys(const DecodeProblem& p, const Cut& cut, Scratch& memory) : p_(p), cut_(cut) {
    k_in_place_ = !p.k.half && cut.stride == p.width;
    v_in_place_ = !p.v.half && cut.value_stride == p.value_width;
    k_apart = k_in_place_ ? static_cast<int>(p.k.row / 4) : cut.stride;
    v_apart = v_in_place_ ? static_cast<int>(p.v.row / 4) : cut.value_stride;
    k_ = memory.take((W + 1) * cut.stride);
    v_ = memory.take((W + 1) * cut.value_stride);
    std::fill_n(k_ + W * cut.stride, cut.stride, 0.f);
    std::fill_n(v_ + W * cut.value_stride, cut.value_stride, 0.f);
  }

  void read_from(int64_t b, int64_t start, int64_t last, int64_t kv_head) {
    const int stride = cut_.stride, value_stride = cut_.value_stride;
    here = static_cast<int>(std::min<int64_t>(W, last - start));
    for (int e = 0; e < here; ++e) {
      const char *k = p_.k.at(b, start + e, kv_head), *v = p_.v.at(b, start + e, kv_head);
      k_rows[e] = k_in_place_ ? reinterpret_cast<const float*>(k) : k_ + e * stride;
      v_rows[e] = v_in_place_ ? reinterpret_cast<const float*>(v) : v_ + e * value_stride;
      if (!k_in_place_) read(p_.k, k, p_.width, k_ + e * stride, stride);
      if (!v_in_place_) read(p_.v, v, p_.value_width, v_ + e * value_stride, value_stride);
      if (start + e + 2 * W < last) {
        foresee(p_.k, k + 2 * W * p_.k.row, p_.width);
        foresee(p_.v, v + 2 * W * p_.v.row, p_.value_width);
      }
    }
    for (int e = here; e < W; ++e) {
      k_rows[e] = k_ + W * stride;
      v_rows[e] = v_ + W * value_stride;
    }
  }

 private:
  const DecodeProblem& p_;
  const Cut& cut_;
  bool k_in_place_, v_in_place_;
  float *k_, *v_;
};

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

// s[row][lane]: the products of some rows with W others; `turned` has room for these as lanes.
void products(const float* x, int stride, int64_t count, const float* const (&rows)[W], int width, float* turned, float* s) {
  if (count <= kFewRows) {
    for (int64_t i = 0; i < count; ++i) store(s + i * W, dots(x + i * stride, rows, stride));
  } else {
    lanes(rows, width, turned);
    scores(x, stride, static_cast<int>(count), &turned, 1, width, s, W);
  }
}

// -inf for the lanes whose keys a query may not see.
inline vec unseen(const DecodeProblem& p, int64_t query, int64_t start, int here) {
  const int64_t seen = p.causal ? std::min<int64_t>(here, query + p.keys - p.queries + 1 - start) : here;
  return seen < W ? lane_mask(0, static_cast<int>(seen)) : vec{};
}

}  // namespace

void decode_forward(const DecodeProblem& p, Rows out, float* lse) {
  const Cut cut(p);
  const int stride = cut.stride, value_stride = cut.value_stride;
  const int64_t rows = cut.rows, all = cut.all, splits = cut.splits;
  // Of each part: the largest logit, the sum of exponentials, the weighted values.
  std::vector<float> most(p.batch * splits * all), total(most.size()), sums(most.size() * value_stride);

  parallel(p.batch * splits, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / splits, first = cut.first(item % splits), last = cut.last(p, item % splits);
      memory.reset(Keys::size(cut) + static_cast<size_t>(all) * stride + W * stride + static_cast<size_t>(rows) * W);
      Keys keys(p, cut, memory);
      float* q = memory.take(static_cast<size_t>(all) * stride);
      float* turned = memory.take(W * stride);
      float* s = memory.take(static_cast<size_t>(rows) * W);
      float *top = &most[item * all], *mass = &total[item * all], *o = &sums[item * all * value_stride];
      std::fill_n(top, all, -kInf);
      for (int64_t place = 0; place < all; ++place)
        read(p.q, p.q.at(b, cut.query(p, place), cut.head(p, place)), p.width, q + place * stride, stride, p.scale);
      // A few keys at a time and all heads of them: memory is then read as W streams that run on.
      for (int64_t start = first; start < last; start += W) {
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
          keys.read_from(b, start, last, kv_head);
          products(q + kv_head * rows * stride, stride, rows, keys.k_rows, p.width, turned, s);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t place = kv_head * rows + row;
            vec x = load(s + row * W) + unseen(p, row % p.queries, start, keys.here);
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
          const int lo = 0;
          mix(s, W, static_cast<int>(rows), {&keys.v_rows[0], &lo, &keys.here, 1}, value_stride, keys.v_apart,
              o + kv_head * rows * value_stride, value_stride, true);
        }
      }
    }
  });

  parallel(p.batch * all, [&](int64_t begin, int64_t end) {
    std::vector<float> o(value_stride);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / all, place = item % all, head = cut.head(p, place), query = cut.query(p, place);
      const auto at = [&](int64_t split) { return (b * splits + split) * all + place; };
      float peak = -kInf, mass = 0;
      for (int64_t split = 0; split < splits; ++split) peak = std::max(peak, most[at(split)]);
      std::fill(o.begin(), o.end(), 0.f);
      for (int64_t split = 0; split < splits && peak > -kInf; ++split) {
        const float factor = std::exp(most[at(split)] - peak);
        mass += factor * total[at(split)];
        for (int c = 0; c < value_stride; ++c) o[c] += factor * sums[at(split) * value_stride + c];
      }
      lse[(b * p.queries + query) * p.heads + head] = peak > -kInf ? peak + std::log(mass) : -kInf;
      write(out, out.at(b, query, head), p.value_width, o.data(), mass > 0 ? 1.f / mass : 0.f);
    }
  });
}

// A key lies in one part, which has all of its gradient; that of a query is summed over the parts.
void decode_backward(const DecodeProblem& p, Rows out, const float* lse, Rows out_gradient, const float* lse_gradient,
                     Rows dq, Rows dk, Rows dv) {
  const Cut cut(p);
  const int stride = cut.stride, value_stride = cut.value_stride;
  const int64_t rows = cut.rows, all = cut.all, splits = cut.splits;
  std::vector<float> sums(p.batch * splits * all * stride);

  parallel(p.batch * splits, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / splits, first = cut.first(item % splits), last = cut.last(p, item % splits);
      memory.reset(Keys::size(cut) + static_cast<size_t>(all + W) * (stride + value_stride) + 2 * all +
                   W * std::max(stride, value_stride) + 2 * static_cast<size_t>(rows) * W);
      Keys keys(p, cut, memory);
      float* q = memory.take(static_cast<size_t>(all) * stride);
      float* go = memory.take(static_cast<size_t>(all) * value_stride);
      float* shift = memory.take(all);
      float* delta = memory.take(all);
      float* turned = memory.take(W * std::max(stride, value_stride));
      float* k_gradient = memory.take(W * stride);
      float* v_gradient = memory.take(W * value_stride);
      float* s = memory.take(static_cast<size_t>(rows) * W);
      float* ds = memory.take(static_cast<size_t>(rows) * W);
      for (int64_t place = 0; place < all; ++place) {
        const int64_t query = cut.query(p, place), head = cut.head(p, place);
        const int64_t at = (b * p.queries + query) * p.heads + head;
        read(p.q, p.q.at(b, query, head), p.width, q + place * stride, stride, p.scale);
        read(out_gradient, out_gradient.at(b, query, head), p.value_width, go + place * value_stride, value_stride);
        read(out, out.at(b, query, head), p.value_width, v_gradient, value_stride);
        shift[place] = lse[at] == -kInf ? 0 : lse[at];
        delta[place] = dot(go + place * value_stride, v_gradient, value_stride) - (lse_gradient ? lse_gradient[at] : 0);
      }
      for (int64_t start = first; start < last; start += W) {
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
          keys.read_from(b, start, last, kv_head);
          const float *queries = q + kv_head * rows * stride, *gradients = go + kv_head * rows * value_stride;
          products(queries, stride, rows, keys.k_rows, p.width, turned, s);
          products(gradients, value_stride, rows, keys.v_rows, p.value_width, turned, ds);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t place = kv_head * rows + row;
            const vec x = exp(load(s + row * W) + unseen(p, row % p.queries, start, keys.here) - splat(shift[place]));
            store(s + row * W, x);
            store(ds + row * W, x * (load(ds + row * W) - splat(delta[place])));
          }
          const int lo = 0, count = static_cast<int>(rows);
          const Blocks block{&keys.k_rows[0], &lo, &keys.here, 1};
          mix(ds, W, count, block, stride, keys.k_apart, &sums[(item * all + kv_head * rows) * stride], stride, true);
          std::fill_n(k_gradient, W * stride, 0.f);
          std::fill_n(v_gradient, W * value_stride, 0.f);
          spread(ds, W, count, queries, stride, &k_gradient, block);
          spread(s, W, count, gradients, value_stride, &v_gradient, block);
          for (int e = 0; e < keys.here; ++e) {
            write(dk, dk.at(b, start + e, kv_head), p.width, k_gradient + e * stride);
            write(dv, dv.at(b, start + e, kv_head), p.value_width, v_gradient + e * value_stride);
          }
        }
      }
    }
  });

  parallel(p.batch * all, [&](int64_t begin, int64_t end) {
    std::vector<float> total(stride);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / all, place = item % all;
      std::fill(total.begin(), total.end(), 0.f);
      for (int64_t split = 0; split < splits; ++split)
        for (int c = 0; c < stride; ++c) total[c] += sums[((b * splits + split) * all + place) * stride + c];
      write(dq, dq.at(b, cut.query(p, place), cut.head(p, place)), p.width, total.data(), p.scale);
    }
  });
}

}  // namespace regard
