#include "grouped.h"

#include <map>

namespace regard {
namespace {

// One run of tokens along an axis: their positions and their places in the window.
struct Run {
  std::vector<int32_t> position, slot;
};

std::vector<Run> runs(int64_t length, int64_t size, int64_t shift, bool grid) {
  const int64_t whole = (length + size - 1) / size * size, apart = whole / size;
  std::vector<Run> all;
  if (grid) {
    for (int64_t first = 0; first < apart; ++first) {
      Run run;
      for (int64_t slot = 0; first + slot * apart < length; ++slot) {
        run.position.push_back(static_cast<int32_t>(first + slot * apart));
        run.slot.push_back(static_cast<int32_t>(slot));
      }
      if (!run.position.empty()) all.push_back(run);
    }
    return all;
  }
  for (int64_t position = 0; position < length; ++position) {
    const int64_t rolled = (position - shift + whole) % whole;
    const bool starts = position == 0 || position == shift || rolled % size == 0;
    if (starts) all.emplace_back();
    all.back().position.push_back(static_cast<int32_t>(position));
    all.back().slot.push_back(static_cast<int32_t>(rolled % size));
  }
  return all;
}

// The bias of each head and pattern, laid out as logits are: `[queries][blocks][W]`, -inf behind the last key.
struct BiasTables {
  std::vector<int64_t> start;  // of each pattern in a head's part
  int64_t per_head = 0;
  std::vector<float> values;

  void lay_out(const Groups& groups) {
    for (const int32_t g : groups.example) {
      start.push_back(per_head);
      per_head += static_cast<int64_t>(groups.queries(g)) * padded(groups.keys(g));
    }
  }

  void fill(const GroupedProblem& problem, const Groups& groups) {
    lay_out(groups);
    values.resize(problem.bias_heads * per_head);
    parallel(problem.bias_heads * static_cast<int64_t>(start.size()), [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t head = item / static_cast<int64_t>(start.size()), p = item % static_cast<int64_t>(start.size());
        const int64_t g = groups.example[p];
        const int keys = groups.keys(g), wide = padded(keys);
        const int32_t* columns = &groups.k_slots[groups.k_start[g]];
        float* to = &values[head * per_head + start[p]];
        for (int i = 0; i < groups.queries(g); ++i, to += wide) {
          const int64_t row = groups.q_slots[groups.q_start[g] + i];
          const float* from = problem.bias + (head * problem.slots + row) * problem.slots;
          for (int j = 0; j < keys; ++j) to[j] = from[columns[j]];
          for (int j = keys; j < wide; ++j) to[j] = -kInf;
        }
      }
    });
  }
};

// The keys and values of one group and head, packed. For gradients also with the roles of rows and lanes exchanged.
struct Packed {
  int count, blocks, stride, value_stride;
  const float **kt, **v, **k, **vt;  // of each block; k and vt for gradients only
  int *lo, *hi;

  static size_t size(const GroupedProblem& p, int keys, bool gradients) {
    const size_t slots = padded(keys), width = padded(p.width), value = padded(p.value_width);
    return (slots + (gradients ? slots : W)) * width + (gradients ? 2 : 1) * slots * value + 12 * (slots / W) + 96;
  }

  Packed(const GroupedProblem& p, const Groups& groups, int64_t b, int64_t g, int64_t head, Scratch& memory,
         bool gradients) {
    count = groups.keys(g);
    blocks = padded(count) / W;
    stride = padded(p.width);
    value_stride = padded(p.value_width);
    kt = memory.take_of<const float*>(blocks);
    v = memory.take_of<const float*>(blocks);
    k = memory.take_of<const float*>(blocks);
    vt = memory.take_of<const float*>(blocks);
    lo = memory.take_of<int>(blocks);
    hi = memory.take_of<int>(blocks);
    const bool in_place = !gradients && !p.k.half && stride == p.width;
    const int32_t* rows = groups.k_rows.data() + groups.k_start[g];
    float* k_rows = gradients ? nullptr : memory.take(W * stride);
    for (int block = 0; block < blocks; ++block) {
      if (gradients) k_rows = memory.take(W * stride);
      float* v_rows = memory.take(W * value_stride);
      float* to = memory.take(W * p.width);
      const float *of_k[W], *of_v[W];
      const int here = std::min(W, count - block * W);
      for (int e = 0; e < W; ++e) {
        float* k_row = k_rows + e * stride;
        float* v_row = v_rows + e * value_stride;
        of_k[e] = k_row;
        of_v[e] = v_row;
        if (e < here) {
          const int64_t row = rows[block * W + e];
          const char* from = p.k.at(b, row, head);
          if (in_place)
            of_k[e] = reinterpret_cast<const float*>(from);
          else
            read(p.k, from, p.width, k_row, stride);
          read(p.v, p.v.at(b, row, head), p.value_width, v_row, value_stride);
        } else {
          std::fill_n(k_row, stride, 0.f);
          std::fill_n(v_row, value_stride, 0.f);
        }
      }
      lanes(of_k, p.width, to);
      kt[block] = to;
      v[block] = v_rows;
      lo[block] = 0;
      hi[block] = here;
      if (gradients) {
        float* value_lanes = memory.take(W * p.value_width);
        lanes(of_v, p.value_width, value_lanes);
        k[block] = k_rows;
        vt[block] = value_lanes;
      }
    }
  }

  Blocks of(const float* const* at) const { return {at, lo, hi, blocks}; }
};

void foresee_group(const GroupedProblem& p, const Groups& groups, int64_t item, int64_t kv_head) {
  const int64_t b = item / groups.count(), g = item % groups.count(), repeat = p.heads / p.kv_heads;
  for (int64_t j = groups.k_start[g]; j < groups.k_start[g + 1]; ++j) {
    foresee(p.k, p.k.at(b, groups.k_rows[j], kv_head), p.width);
    foresee(p.v, p.v.at(b, groups.k_rows[j], kv_head), p.value_width);
  }
  for (int64_t i = groups.q_start[g]; i < groups.q_start[g + 1]; ++i)
    foresee(p.q, p.q.at(b, groups.q_rows[i], kv_head * repeat), p.width * static_cast<int>(repeat));
}

// Logits of a strip: products, then the bias or the mask of the lanes behind the last key.
void strip_logits(const Packed& packed, const float* q, int rows, int width, const float* bias, float* s) {
  const int lds = packed.blocks * W;
  scores(q, packed.stride, rows, packed.kt, packed.blocks, width, s, lds);
  if (bias != nullptr) {
    for (int j = 0; j < rows * lds; j += W) store(s + j, load(s + j) + load(bias + j));
  } else if (packed.count % W) {
    const vec mask = lane_mask(0, packed.count % W);
    for (int i = 0; i < rows; ++i) {
      float* last = s + i * lds + lds - W;
      store(last, load(last) + mask);
    }
  }
}

int strip_rows(int queries, int blocks) {
  const Parts parts(queries, std::max(8, std::min(64, 16384 / std::max(1, blocks * W))));
  return parts.of(0);
}

}  // namespace

Groups window_groups(const std::vector<int64_t>& spatial, const std::vector<int64_t>& size,
                     const std::vector<int64_t>& shift, bool grid) {
  Groups groups;
  groups.q_start.push_back(0);
  std::vector<std::vector<Run>> axes;
  for (size_t a = 0; a < spatial.size(); ++a) axes.push_back(runs(spatial[a], size[a], shift[a], grid));
  std::map<std::vector<int32_t>, int32_t> patterns;
  std::vector<size_t> at(axes.size(), 0);
  for (bool more = true; more;) {
    std::vector<int32_t> positions{0}, slots{0};
    for (size_t a = 0; a < axes.size(); ++a) {
      const Run& run = axes[a][at[a]];
      std::vector<int32_t> p, s;
      for (size_t i = 0; i < positions.size(); ++i)
        for (size_t j = 0; j < run.position.size(); ++j) {
          p.push_back(positions[i] * static_cast<int32_t>(spatial[a]) + run.position[j]);
          s.push_back(slots[i] * static_cast<int32_t>(size[a]) + run.slot[j]);
        }
      positions.swap(p);
      slots.swap(s);
    }
    const auto [entry, fresh] = patterns.emplace(slots, static_cast<int32_t>(patterns.size()));
    if (fresh) groups.example.push_back(static_cast<int32_t>(groups.pattern.size()));
    groups.pattern.push_back(entry->second);
    groups.q_rows.insert(groups.q_rows.end(), positions.begin(), positions.end());
    groups.q_slots.insert(groups.q_slots.end(), slots.begin(), slots.end());
    groups.q_start.push_back(static_cast<int64_t>(groups.q_rows.size()));
    more = false;
    for (size_t a = axes.size(); a-- > 0 && !more;) {
      more = ++at[a] < axes[a].size();
      if (!more) at[a] = 0;
    }
  }
  groups.k_rows = groups.q_rows;
  groups.k_slots = groups.q_slots;
  groups.k_start = groups.q_start;
  return groups;
}

void grouped_forward(const GroupedProblem& p, const Groups& groups, Rows out, float* lse, int64_t rows) {
  BiasTables tables;
  if (p.bias != nullptr) tables.fill(p, groups);
  const int stride = padded(p.width), value_stride = padded(p.value_width);
  const int64_t repeat = p.heads / p.kv_heads;
  parallel(p.batch * groups.count(), [&](int64_t first, int64_t last) {
    Scratch& memory = scratch();
    for (int64_t item = first; item < last; ++item) {
      const int64_t b = item / groups.count(), g = item % groups.count();
      const int queries = groups.queries(g), keys = groups.keys(g), wide = padded(keys);
      const int part = queries ? strip_rows(queries, wide / W) : 0;
      const int32_t* q_rows = groups.q_rows.data() + groups.q_start[g];
      for (int64_t kv_head = 0; kv_head < p.kv_heads && queries; ++kv_head) {
        if (item + 1 < last) foresee_group(p, groups, item + 1, kv_head);
        memory.reset(Packed::size(p, keys, false) + static_cast<size_t>(part) * (stride + wide + value_stride));
        const Packed packed(p, groups, b, g, kv_head, memory, false);
        float* q = memory.take(part * stride);
        float* s = memory.take(static_cast<size_t>(part) * wide);
        float* o = memory.take(part * value_stride);
        for (int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
          const float* bias = p.bias == nullptr ? nullptr
                                                : &tables.values[(p.bias_heads > 1 ? head : 0) * tables.per_head +
                                                                 tables.start[groups.pattern[g]]];
          for (int start = 0; start < queries; start += part) {
            const int here = std::min(part, queries - start);
            for (int i = 0; i < here; ++i)
              read(p.q, p.q.at(b, q_rows[start + i], head), p.width, q + i * stride, stride, p.scale);
            strip_logits(packed, q, here, p.width, bias ? bias + static_cast<int64_t>(start) * wide : nullptr, s);
            float totals[64], logs[64];
            std::fill_n(totals, here, kInf);  // a group without keys gives zeros
            std::fill_n(logs, here, -kInf);
            if (packed.blocks) softmax_rows(s, wide, here, packed.blocks, totals, logs);
            for (int i = 0; i < here; ++i) lse[(b * rows + q_rows[start + i]) * p.heads + head] = logs[i];
            mix(s, wide, here, packed.of(packed.v), value_stride, value_stride, o, value_stride);
            for (int i = 0; i < here; ++i)
              write(out, out.at(b, q_rows[start + i], head), p.value_width, o + i * value_stride,
                    1.f / totals[i]);
          }
        }
      }
    }
  });
}

void grouped_backward(const GroupedProblem& p, const Groups& groups, const float* lse, int64_t rows,
                      Rows out_gradient, Rows dq, Rows dk, Rows dv, float* bias_gradient) {
  BiasTables tables;
  if (p.bias != nullptr) tables.fill(p, groups);
  const int stride = padded(p.width), value_stride = padded(p.value_width);
  const int64_t repeat = p.heads / p.kv_heads, per_thread = p.bias_heads * tables.per_head;
  std::vector<float> table_gradients(bias_gradient ? threads() * per_thread : 0, 0.f);

  const auto one = [&](int64_t b, int64_t g, int64_t kv_head) {
    Scratch& memory = scratch();
    const int queries = groups.queries(g), keys = groups.keys(g), wide = padded(keys);
    const int part = queries ? strip_rows(queries, wide / W) : 0;
    const int32_t* q_rows = groups.q_rows.data() + groups.q_start[g];
    memory.reset(Packed::size(p, keys, true) + static_cast<size_t>(wide) * (stride + value_stride) +
                 4 * (wide / W) + 64 + static_cast<size_t>(part) * (2 * stride + 2 * wide + value_stride));
    const Packed packed(p, groups, b, g, kv_head, memory, true);
    float* k_sums = memory.take(static_cast<size_t>(wide) * stride);
    float* v_sums = memory.take(static_cast<size_t>(wide) * value_stride);
    std::fill_n(k_sums, static_cast<size_t>(wide) * stride, 0.f);
    std::fill_n(v_sums, static_cast<size_t>(wide) * value_stride, 0.f);
    float** k_to = memory.take_of<float*>(packed.blocks);
    float** v_to = memory.take_of<float*>(packed.blocks);
    for (int block = 0; block < packed.blocks; ++block) {
      k_to[block] = k_sums + block * W * stride;
      v_to[block] = v_sums + block * W * value_stride;
    }
    float* q = memory.take(part * stride);
    float* q_out = memory.take(part * stride);
    float* s = memory.take(static_cast<size_t>(part) * wide);
    float* ds = memory.take(static_cast<size_t>(part) * wide);
    float* go = memory.take(part * value_stride);
    for (int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
      const int64_t table = p.bias == nullptr ? 0
                                              : (p.bias_heads > 1 ? head : 0) * tables.per_head +
                                                    tables.start[groups.pattern[g]];
      for (int start = 0; start < queries; start += part) {
        const int here = std::min(part, queries - start);
        const int64_t corner = table + static_cast<int64_t>(start) * wide;
        if (packed.blocks) {
          for (int i = 0; i < here; ++i) {
            const int64_t row = q_rows[start + i];
            read(p.q, p.q.at(b, row, head), p.width, q + i * stride, stride, p.scale);
            read(out_gradient, out_gradient.at(b, row, head), p.value_width, go + i * value_stride, value_stride);
          }
          strip_logits(packed, q, here, p.width, p.bias ? &tables.values[corner] : nullptr, s);
          scores(go, value_stride, here, packed.vt, packed.blocks, p.value_width, ds, wide);
          for (int i = 0; i < here; ++i)
            softmax_row_gradient(s + i * wide, ds + i * wide, packed.blocks,
                                 lse[(b * rows + q_rows[start + i]) * p.heads + head], 0);
          if (bias_gradient) {
            float* to = &table_gradients[this_thread() * per_thread + corner];
            for (int j = 0; j < here * wide; j += W) store(to + j, load(to + j) + load(ds + j));
          }
          mix(ds, wide, here, packed.of(packed.k), stride, stride, q_out, stride);
          spread(s, wide, here, go, value_stride, v_to, packed.of(packed.v));
          spread(ds, wide, here, q, stride, k_to, packed.of(packed.k));
        } else {
          std::fill_n(q_out, here * stride, 0.f);
        }
        for (int i = 0; i < here; ++i)
          write(dq, dq.at(b, q_rows[start + i], head), p.width, q_out + i * stride, p.scale);
      }
    }
    for (int j = 0; j < keys; ++j) {
      const int64_t row = groups.k_rows[groups.k_start[g] + j];
      if (groups.disjoint) {
        write(dk, dk.at(b, row, kv_head), p.width, k_sums + j * stride);
        write(dv, dv.at(b, row, kv_head), p.value_width, v_sums + j * value_stride);
      } else {
        add(dk.at(b, row, kv_head), p.width, k_sums + j * stride);
        add(dv.at(b, row, kv_head), p.value_width, v_sums + j * value_stride);
      }
    }
  };

  // Groups that share keys are taken one after the other, so that sums have one order and no thread waits for another.
  if (groups.disjoint)
    parallel(p.batch * groups.count(), [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item)
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
          one(item / groups.count(), item % groups.count(), kv_head);
    });
  else
    parallel(p.batch * p.kv_heads, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item)
        for (int64_t g = 0; g < groups.count(); ++g) one(item / p.kv_heads, g, item % p.kv_heads);
    });

  if (bias_gradient == nullptr) return;
  parallel(p.bias_heads, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head)
      for (int thread = 0; thread < threads(); ++thread)
        for (size_t pattern = 0; pattern < groups.example.size(); ++pattern) {
          const int64_t g = groups.example[pattern];
          const int keys = groups.keys(g), wide = padded(keys);
          const float* from = &table_gradients[thread * per_thread + head * tables.per_head + tables.start[pattern]];
          for (int i = 0; i < groups.queries(g); ++i)
            for (int j = 0; j < keys; ++j)
              bias_gradient[(head * p.slots + groups.q_slots[groups.q_start[g] + i]) * p.slots +
                            groups.k_slots[groups.k_start[g] + j]] += from[i * wide + j];
        }
  });
}

}  // namespace regard
