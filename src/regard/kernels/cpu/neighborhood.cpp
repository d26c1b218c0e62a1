#include "neighborhood.h"

namespace regard {

// The rule of Generalized Neighborhood Attention (arXiv 2504.16922), in ranks inside a group of equal position modulo
// the gap: queries come in groups of `stride` that share the window of their leader.
Axis::Axis(int64_t length, int64_t kernel, int64_t stride, int64_t gap, bool causal)
    : length(length), kernel(kernel), gap(gap), first(length), count(length), ranks(length) {
  for (int64_t position = 0; position < length; ++position) {
    const int64_t group = position % gap, rank = position / gap, size = (length - group + gap - 1) / gap;
    const int64_t leader = std::min(rank / stride * stride + (causal ? stride - 1 : stride / 2), size - 1);
    const int64_t start = causal ? std::max<int64_t>(leader - kernel + 1, 0)
                                 : std::min(std::max<int64_t>(leader - kernel / 2, 0), size - kernel);
    ranks[position] = static_cast<int32_t>(rank);
    first[position] = static_cast<int32_t>(start * gap + group);
    count[position] = static_cast<int32_t>((causal ? rank + 1 : start + kernel) - start);
  }
}

namespace {

// Neighbouring queries of the last axis, and the run of keys that holds all their windows: one lane a key.
struct Column {
  std::vector<int32_t> queries;
  int32_t first_key, keys;
};

constexpr size_t kMostQueries = 32;

std::vector<Column> columns_within(const Axis& axis, int most_keys) {
  std::vector<Column> columns;
  for (int64_t group = 0; group < axis.gap; ++group) {
    int64_t start = 0, end = 0;  // ranks of keys
    bool fresh = true;
    for (int64_t position = group; position < axis.length; position += axis.gap) {
      const int64_t from = axis.rank(axis.first[position]), to = from + axis.count[position];
      const int64_t low = fresh ? from : std::min(start, from), high = fresh ? to : std::max(end, to);
      if (fresh || high - low > most_keys || columns.back().queries.size() == kMostQueries) {
        columns.emplace_back();
        start = from;
        end = to;
        fresh = false;
      } else {
        start = low;
        end = high;
      }
      Column& column = columns.back();
      column.queries.push_back(static_cast<int32_t>(position));
      column.first_key = static_cast<int32_t>(start * axis.gap + group);
      column.keys = static_cast<int32_t>(end - start);
    }
  }
  return columns;
}

// Wide columns waste products on lanes that a query does not see, narrow ones leave too few queries for a tile.
std::vector<Column> best_columns(const Axis& axis) {
  std::vector<Column> best;
  double least = 0;
  for (int blocks = padded(axis.kernel) / W; blocks <= padded(axis.kernel) / W + 2; ++blocks) {
    std::vector<Column> some = columns_within(axis, blocks * W);
    const double queries = static_cast<double>(axis.length) / static_cast<double>(some.size());
    const double cost = blocks * (1 + 2 / queries);
    if (best.empty() || cost < least) {
      least = cost;
      best.swap(some);
    }
  }
  return best;
}

struct Plan {
  const Axis &outer, &middle, &last;
  std::vector<Column> columns;
  int64_t outer_rows, tokens;
  int64_t bias_row, bias_pad, bias_rows;  // a padded row of biases for each offset on the outer axes

  explicit Plan(const NeighborhoodProblem& p)
      : outer(p.axes[0]), middle(p.axes[1]), last(p.axes[2]), columns(best_columns(p.axes[2])) {
    outer_rows = outer.length * middle.length;
    tokens = outer_rows * last.length;
    // Lanes that hold no neighbour read behind either end of a row.
    int64_t most = 0;
    for (const Column& column : columns) most = std::max<int64_t>(most, padded(column.keys));
    bias_pad = most + 32;
    bias_row = 2 * last.kernel - 1 + 2 * bias_pad;
    bias_rows = (2 * outer.kernel - 1) * (2 * middle.kernel - 1);
  }

  int64_t token(int64_t outer_row, int64_t position) const { return outer_row * last.length + position; }
};

std::vector<float> padded_bias(const NeighborhoodProblem& p, const Plan& plan) {
  std::vector<float> rows(p.heads * plan.bias_rows * plan.bias_row, 0.f);
  const int64_t wide = 2 * plan.last.kernel - 1;
  for (int64_t row = 0; row < p.heads * plan.bias_rows; ++row)
    std::copy_n(p.bias + row * wide, wide, &rows[row * plan.bias_row + plan.bias_pad]);
  return rows;
}

// The keys and values under one column, all outer rows of them, in blocks: those of outer row r start at r * blocks.
struct Strip {
  int blocks, stride, value_stride, most;  // most: blocks that one outer row of queries may see
  float *k, *kt, *v, *vt;

  static size_t size(const NeighborhoodProblem& p, const Plan& plan, const Column& column, bool gradients) {
    const size_t slots = plan.outer_rows * padded(column.keys);
    return gradients ? 2 * slots * (padded(p.width) + padded(p.value_width))
                     : slots * (padded(p.width) + padded(p.value_width)) + W * padded(p.width);
  }

  Strip(const NeighborhoodProblem& p, const Plan& plan, const Column& column, int64_t b, int64_t head, Scratch& memory,
        bool gradients) {
    blocks = padded(column.keys) / W;
    stride = padded(p.width);
    value_stride = padded(p.value_width);
    most = static_cast<int>(plan.outer.kernel * plan.middle.kernel) * blocks;
    const size_t slots = plan.outer_rows * blocks * W;
    k = memory.take(gradients ? slots * stride : W * stride);
    kt = memory.take(slots * stride);
    v = memory.take(slots * value_stride);
    vt = gradients ? memory.take(slots * value_stride) : nullptr;
    for (int64_t row = 0; row < plan.outer_rows; ++row)
      for (int block = 0; block < blocks; ++block) {
        const int64_t place = row * blocks + block;
        float* k_rows = k + (gradients ? place * W * stride : 0);
        float* v_rows = v + place * W * value_stride;
        const float *of_k[W], *of_v[W];
        for (int e = 0; e < W; ++e) {
          const int key = block * W + e;
          of_k[e] = k_rows + e * stride;
          of_v[e] = v_rows + e * value_stride;
          if (key < column.keys) {
            const int64_t token = plan.token(row, column.first_key + key * plan.last.gap);
            read(p.k, p.k.at(b, token, head), p.width, k_rows + e * stride, stride);
            read(p.v, p.v.at(b, token, head), p.value_width, v_rows + e * value_stride, value_stride);
            if (row + 2 < plan.outer_rows) {
              foresee(p.k, p.k.at(b, token + 2 * plan.last.length, head), p.width);
              foresee(p.v, p.v.at(b, token + 2 * plan.last.length, head), p.value_width);
            }
          } else {
            std::fill_n(k_rows + e * stride, stride, 0.f);
            std::fill_n(v_rows + e * value_stride, value_stride, 0.f);
          }
        }
        lanes(of_k, p.width, kt + place * W * stride);
        if (gradients) lanes(of_v, p.value_width, vt + place * W * value_stride);
      }
  }
};

constexpr int kKeys = W == 16 ? 8 : 4;  // that share a sum over queries
static_assert(W % kKeys == 0 && kKeys <= kRows);

// The blocks that the queries of one outer row see, and the lanes of each query.
struct Sight {
  int count = 0, queries;
  const float **kt, **v, **k, **vt;
  float **dk, **dv;
  int64_t* bias;  // offset of the row of biases for each block
  int *lo, *hi;   // lanes in play in each block, for some of the queries
  float* masks;   // (queries, most blocks, W): what is added to logits
  int *from, *to; // first and last key of each query

  static size_t size(int most, int queries, int blocks) {
    return 12 * most + 4 * most + 2 * queries + static_cast<size_t>(queries) * most * W + 64;
  }

  Sight(const Plan& plan, const Column& column, const Strip& strip, Scratch& memory) {
    const int most = strip.most;
    queries = static_cast<int>(column.queries.size());
    kt = memory.take_of<const float*>(most);
    v = memory.take_of<const float*>(most);
    k = memory.take_of<const float*>(most);
    vt = memory.take_of<const float*>(most);
    dk = memory.take_of<float*>(most);
    dv = memory.take_of<float*>(most);
    bias = memory.take_of<int64_t>(most);
    lo = memory.take_of<int>(most);
    hi = memory.take_of<int>(most);
    masks = memory.take(static_cast<size_t>(queries) * most * W);
    from = memory.take_of<int>(queries);
    to = memory.take_of<int>(queries);
    for (int i = 0; i < queries; ++i) {
      const int32_t position = column.queries[i];
      from[i] = static_cast<int>((plan.last.first[position] - column.first_key) / plan.last.gap);
      to[i] = from[i] + plan.last.count[position];
      for (int g = 0; g < most; ++g) {
        const int first = g % strip.blocks * W;
        store(masks + (i * most + g) * W, lane_mask(from[i] - first, to[i] - first));
      }
    }
  }

  void look(const Plan& plan, const Strip& strip, int64_t row, float* k_sums, float* v_sums) {
    const int64_t z = row / plan.middle.length, y = row % plan.middle.length;
    count = 0;
    for (int a = 0; a < plan.outer.count[z]; ++a)
      for (int c = 0; c < plan.middle.count[y]; ++c) {
        const int64_t key_z = plan.outer.first[z] + a * plan.outer.gap, key_y = plan.middle.first[y] + c * plan.middle.gap;
        const int64_t key_row = key_z * plan.middle.length + key_y;
        const int64_t offset = (plan.outer.rank(key_z) - plan.outer.rank(z) + plan.outer.kernel - 1) *
                                   (2 * plan.middle.kernel - 1) +
                               plan.middle.rank(key_y) - plan.middle.rank(y) + plan.middle.kernel - 1;
        for (int block = 0; block < strip.blocks; ++block, ++count) {
          const int64_t place = (key_row * strip.blocks + block) * W;
          kt[count] = strip.kt + place * strip.stride;
          v[count] = strip.v + place * strip.value_stride;
          bias[count] = offset * plan.bias_row + plan.bias_pad + plan.last.kernel - 1 + block * W;
          if (k_sums != nullptr) {
            k[count] = strip.k + place * strip.stride;
            vt[count] = strip.vt + place * strip.value_stride;
            dk[count] = k_sums + place * strip.stride;
            dv[count] = v_sums + place * strip.value_stride;
          }
        }
      }
  }

  // Where the bias of query i for the first lane of block g stands in the rows of its head.
  int64_t bias_at(const Plan& plan, const Column& column, int i, int g) const {
    return bias[g] + plan.last.rank(column.first_key) - plan.last.rank(column.queries[i]);
  }

  // y[g][lane] += sum_i p[i][g][lane] x_i, a few keys at a time and only the queries that see one of them.
  void spread(const float* p, int lds, const float* x, int stride, int blocks, float* const* y) const {
    const Parts across(stride / W, std::min(kWidth, kSums / kKeys));
    for (int block = 0; block < blocks; ++block)
      for (int lane = 0; lane < W; lane += kKeys) {
        int first = 0, last = queries;  // windows move on with their queries
        while (first < last && to[first] <= block * W + lane) ++first;
        while (first < last && from[last - 1] >= block * W + lane + kKeys) --last;
        if (first == last) continue;
        const Blocks seers{&x, &first, &last, 1};
        for (int g = block; g < count; g += blocks)
          for (int a = 0, c = 0; a < across.count; c += across.of(a++))
            mix_of(kKeys, across.of(a), std::make_integer_sequence<int, kRows * kWidth>{})(
                p + g * W + lane, 1, lds, seers, c * W, stride, y[g] + lane * stride + c * W, stride, true);
      }
  }

  // The lanes of each block that some query of [first, last) sees.
  Blocks of(const float* const* at, int blocks, int first, int last) {
    const int low = *std::min_element(from + first, from + last), high = *std::max_element(to + first, to + last);
    for (int g = 0; g < count; ++g) {
      lo[g] = std::max(low - g % blocks * W, 0);
      hi[g] = std::min(high - g % blocks * W, W);
    }
    return {at, lo, hi, count};
  }
};

void add_bias(const Plan& plan, const Column& column, const Sight& sight, const float* bias, float* s) {
  for (int i = 0; i < sight.queries; ++i)
    for (int g = 0; g < sight.count; ++g) {
      float* to = s + (i * sight.count + g) * W;
      store(to, load(to) + load(bias + sight.bias_at(plan, column, i, g)));
    }
}

constexpr int kNeighbours = 4;  // queries that share a weighted sum: few, so that little is spent on lanes of others

}  // namespace

void neighborhood_forward(const NeighborhoodProblem& p, Rows out, float* lse) {
  const Plan plan(p);
  const std::vector<float> biases = p.bias ? padded_bias(p, plan) : std::vector<float>();
  const int64_t columns = static_cast<int64_t>(plan.columns.size()), repeat = p.heads / p.kv_heads;
  parallel(p.batch * p.kv_heads * columns, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const Column& column = plan.columns[item % columns];
      const int64_t kv_head = item / columns % p.kv_heads, b = item / columns / p.kv_heads;
      const int queries = static_cast<int>(column.queries.size()), blocks = padded(column.keys) / W;
      const int most = static_cast<int>(plan.outer.kernel * plan.middle.kernel) * blocks;
      const int stride = padded(p.width), value_stride = padded(p.value_width);
      memory.reset(Strip::size(p, plan, column, false) + Sight::size(most, queries, blocks) +
                   static_cast<size_t>(queries) * (stride + value_stride + most * W));
      const Strip strip(p, plan, column, b, kv_head, memory, false);
      Sight sight(plan, column, strip, memory);
      float* q = memory.take(static_cast<size_t>(queries) * stride);
      float* o = memory.take(static_cast<size_t>(queries) * value_stride);
      float* s = memory.take(static_cast<size_t>(queries) * most * W);
      for (int64_t row = 0; row < plan.outer_rows; ++row) {
        sight.look(plan, strip, row, nullptr, nullptr);
        const int lds = sight.count * W;
        if (row + 1 < plan.outer_rows)
          for (const int32_t position : column.queries) {
            const int64_t token = plan.token(row + 1, position);
            foresee(p.q, p.q.at(b, token, kv_head * repeat), p.width * static_cast<int>(repeat));
            foresee(out, out.at(b, token, kv_head * repeat), p.value_width * static_cast<int>(repeat));
          }
        for (int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
          for (int i = 0; i < queries; ++i)
            read(p.q, p.q.at(b, plan.token(row, column.queries[i]), head), p.width, q + i * stride, stride, p.scale);
          scores(q, stride, queries, sight.kt, sight.count, p.width, s, lds, sight.masks, most * W);
          if (p.bias) add_bias(plan, column, sight, &biases[head * plan.bias_rows * plan.bias_row], s);
          float totals[kMostQueries], logs[kMostQueries];
          softmax_rows(s, lds, queries, sight.count, totals, logs);
          for (int i = 0; i < queries; i += kNeighbours) {
            const int some = std::min(kNeighbours, queries - i);
            mix(s + i * lds, lds, some, sight.of(sight.v, blocks, i, i + some), value_stride, value_stride,
                o + i * value_stride, value_stride);
          }
          for (int i = 0; i < queries; ++i) {
            const int64_t token = plan.token(row, column.queries[i]);
            lse[(b * plan.tokens + token) * p.heads + head] = logs[i];
            write(out, out.at(b, token, head), p.value_width, o + i * value_stride, 1.f / totals[i]);
          }
        }
      }
    }
  });
}

void neighborhood_backward(const NeighborhoodProblem& p, const float* lse, Rows out_gradient,
                           const float* lse_gradient, Rows dq, Rows dk, Rows dv, float* bias_gradient) {
  const Plan plan(p);
  const std::vector<float> biases = p.bias ? padded_bias(p, plan) : std::vector<float>();
  const int64_t columns = static_cast<int64_t>(plan.columns.size()), repeat = p.heads / p.kv_heads;
  const int64_t per_head = plan.bias_rows * plan.bias_row;
  const int64_t parts = parts_with(p.batch * p.kv_heads * columns, bias_gradient ? p.heads * per_head : 0);
  std::vector<float> bias_sums(bias_gradient ? parts * p.heads * per_head : 0, 0.f);

  const auto one = [&](int64_t b, int64_t kv_head, const Column& column, int64_t part) {
    Scratch& memory = scratch();
    const int queries = static_cast<int>(column.queries.size()), blocks = padded(column.keys) / W;
    const int most = static_cast<int>(plan.outer.kernel * plan.middle.kernel) * blocks;
    const int stride = padded(p.width), value_stride = padded(p.value_width);
    const size_t slots = plan.outer_rows * blocks * W;
    memory.reset(Strip::size(p, plan, column, true) + Sight::size(most, queries, blocks) +
                 slots * (stride + value_stride) +
                 static_cast<size_t>(queries) * (2 * stride + value_stride + 2 * most * W));
    const Strip strip(p, plan, column, b, kv_head, memory, true);
    Sight sight(plan, column, strip, memory);
    float* k_sums = memory.take(slots * stride);
    float* v_sums = memory.take(slots * value_stride);
    std::fill_n(k_sums, slots * stride, 0.f);
    std::fill_n(v_sums, slots * value_stride, 0.f);
    float* q = memory.take(static_cast<size_t>(queries) * stride);
    float* q_out = memory.take(static_cast<size_t>(queries) * stride);
    float* go = memory.take(static_cast<size_t>(queries) * value_stride);
    float* s = memory.take(static_cast<size_t>(queries) * most * W);
    float* ds = memory.take(static_cast<size_t>(queries) * most * W);
    for (int64_t row = 0; row < plan.outer_rows; ++row) {
      sight.look(plan, strip, row, k_sums, v_sums);
      const int lds = sight.count * W;
      for (int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
        for (int i = 0; i < queries; ++i) {
          const int64_t token = plan.token(row, column.queries[i]);
          read(p.q, p.q.at(b, token, head), p.width, q + i * stride, stride, p.scale);
          read(out_gradient, out_gradient.at(b, token, head), p.value_width, go + i * value_stride, value_stride);
        }
        scores(q, stride, queries, sight.kt, sight.count, p.width, s, lds, sight.masks, most * W);
        if (p.bias) add_bias(plan, column, sight, &biases[head * per_head], s);
        scores(go, value_stride, queries, sight.vt, sight.count, p.value_width, ds, lds);
        float logs[kMostQueries], log_gradients[kMostQueries];
        for (int i = 0; i < queries; ++i) {
          const int64_t place = (b * plan.tokens + plan.token(row, column.queries[i])) * p.heads + head;
          logs[i] = lse[place];
          log_gradients[i] = lse_gradient ? lse_gradient[place] : 0.f;
        }
        softmax_gradient_rows(s, ds, lds, queries, sight.count, logs, log_gradients);
        if (bias_gradient) {
          float* to = &bias_sums[(part * p.heads + head) * per_head];
          for (int i = 0; i < queries; ++i)
            for (int g = 0; g < sight.count; ++g) {
              float* at = to + sight.bias_at(plan, column, i, g);
              store(at, load(at) + load(ds + i * lds + g * W));
            }
        }
        for (int i = 0; i < queries; i += kNeighbours) {
          const int some = std::min(kNeighbours, queries - i);
          const Blocks near = sight.of(sight.k, blocks, i, i + some);
          mix(ds + i * lds, lds, some, near, stride, stride, q_out + i * stride, stride);
        }
        sight.spread(s, lds, go, value_stride, blocks, sight.dv);
        sight.spread(ds, lds, q, stride, blocks, sight.dk);
        for (int i = 0; i < queries; ++i)
          write(dq, dq.at(b, plan.token(row, column.queries[i]), head), p.width, q_out + i * stride, p.scale);
      }
    }
    for (int64_t row = 0; row < plan.outer_rows; ++row)
      for (int key = 0; key < column.keys; ++key) {
        const int64_t token = plan.token(row, column.first_key + key * plan.last.gap);
        add(dk.at(b, token, kv_head), p.width, k_sums + (row * blocks * W + key) * stride);
        add(dv.at(b, token, kv_head), p.value_width, v_sums + (row * blocks * W + key) * value_stride);
      }
  };

  // Columns whose keys overlap add to the same rows: they take turns, so that every sum has one order.
  int64_t turns = 1;
  const auto clash = [&](const Column& a, const Column& c) {
    const int64_t gap = plan.last.gap;
    return a.first_key % gap == c.first_key % gap && a.first_key < c.first_key + c.keys * gap &&
           c.first_key < a.first_key + a.keys * gap;
  };
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = i + 1; j < columns && clash(plan.columns[i], plan.columns[j]); ++j) turns = std::max(turns, j - i + 1);
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t here = (columns - turn + turns - 1) / turns;
    if (here <= 0) break;
    parallel(p.batch * p.kv_heads * here, parts, [&](int64_t begin, int64_t end, int64_t part) {
      for (int64_t item = begin; item < end; ++item)
        one(item / here / p.kv_heads, item / here % p.kv_heads, plan.columns[turn + item % here * turns], part);
    });
  }

  if (bias_gradient == nullptr) return;
  const int64_t wide = 2 * plan.last.kernel - 1;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t row = 0; row < p.heads * plan.bias_rows; ++row) {
      const float* from = &bias_sums[part * p.heads * per_head + row * plan.bias_row + plan.bias_pad];
      for (int64_t j = 0; j < wide; ++j) bias_gradient[row * wide + j] += from[j];
    }
}

}  // namespace regard
