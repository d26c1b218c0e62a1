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

// The rows of one group, copied for several heads at once: where they lie in memory, the heads of a row are neighbours.
struct Stage {
  int wide, stride, value_stride;
  int64_t queries;
  float *q, *k, *v, *go;

  // How many heads of keys to take at a time: as many as a cache holds with ease.
  static int64_t heads(const GroupedProblem& p, int queries, int keys) {
    const int64_t repeat = p.heads / p.kv_heads;
    const int64_t each = padded(keys) * (padded(p.width) + padded(p.value_width)) +
                         repeat * queries * (padded(p.width) + padded(p.value_width));
    return std::max<int64_t>(1, std::min<int64_t>(p.kv_heads, 131072 / std::max<int64_t>(1, each)));
  }
  static size_t size(const GroupedProblem& p, int queries, int keys, int64_t heads) {
    const size_t width = padded(p.width) + padded(p.value_width);
    return heads * (padded(keys) + p.heads / p.kv_heads * queries) * width;
  }

  Stage(const GroupedProblem& p, const Groups& groups, int64_t b, int64_t g, int64_t first, int64_t heads,
        const Rows* out_gradient, Scratch& memory)
      : wide(padded(groups.keys(g))), stride(padded(p.width)), value_stride(padded(p.value_width)),
        queries(groups.queries(g)) {
    const int64_t repeat = p.heads / p.kv_heads, keys = groups.keys(g);
    q = memory.take(heads * repeat * queries * stride);
    k = memory.take(heads * wide * stride);
    v = memory.take(heads * wide * value_stride);
    go = out_gradient ? memory.take(heads * repeat * queries * value_stride) : nullptr;
    const int32_t* k_rows = groups.k_rows.data() + groups.k_start[g];
    const int32_t* q_rows = groups.q_rows.data() + groups.q_start[g];
    copy(p.k, b, k_rows, keys, first, heads, p.width, k, wide, stride, 1);
    copy(p.v, b, k_rows, keys, first, heads, p.value_width, v, wide, value_stride, 1);
    copy(p.q, b, q_rows, queries, first * repeat, heads * repeat, p.width, q, queries, stride, p.scale);
    if (go)
      copy(*out_gradient, b, q_rows, queries, first * repeat, heads * repeat, p.value_width, go, queries, value_stride, 1);
  }

 private:
  static void copy(const Rows& from, int64_t b, const int32_t* rows, int64_t count, int64_t first, int64_t heads, int width,
                   float* to, int64_t slots, int stride, float scale) {
    if (!from.half && width == stride) {  // nothing to widen, nothing to fill up: this is most of what is read
      const vec factor = splat(scale);
      for (int64_t j = 0; j < count; ++j) {
        const char* row = from.at(b, rows[j], first);
        float* there = to + j * stride;
        for (int64_t h = 0; h < heads; ++h, row += from.head, there += slots * stride) {
          const auto* x = reinterpret_cast<const float*>(row);
          for (int c = 0; c < stride; c += W) store(there + c, load(x + c) * factor);
        }
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const char* row = from.at(b, rows[j], first);
        for (int64_t h = 0; h < heads; ++h) read(from, row + h * from.head, width, to + (h * slots + j) * stride, stride, scale);
      }
    }
    for (int64_t h = 0; h < heads; ++h) std::fill_n(to + (h * slots + count) * stride, (slots - count) * stride, 0.f);
  }
};

// The keys and values of one group and head. For gradients also with the roles of rows and lanes exchanged.
struct Packed {
  int count, blocks, stride, value_stride;
  const float **kt, **v, **k, **vt;  // of each block; vt for gradients only
  int *lo, *hi;
  float* mask;  // zeros, -inf behind the last key

  static size_t size(const GroupedProblem& p, int keys, bool gradients) {
    const size_t slots = padded(keys), width = padded(p.width), value = padded(p.value_width);
    return slots * (width + (gradients ? value : 0)) + slots + 12 * (slots / W) + 96 + 16 * 2 * (slots / W);
  }

  Packed(const GroupedProblem& p, int keys, const float* k_rows, const float* v_rows, Scratch& memory, bool gradients) {
    count = keys;
    blocks = padded(count) / W;
    stride = padded(p.width);
    value_stride = padded(p.value_width);
    kt = memory.take_of<const float*>(blocks);
    v = memory.take_of<const float*>(blocks);
    k = memory.take_of<const float*>(blocks);
    vt = memory.take_of<const float*>(blocks);
    lo = memory.take_of<int>(blocks);
    hi = memory.take_of<int>(blocks);
    mask = memory.take(blocks * W);
    std::fill_n(mask, count, 0.f);
    std::fill_n(mask + count, blocks * W - count, -kInf);
    for (int block = 0; block < blocks; ++block) {
      k[block] = k_rows + block * W * stride;
      v[block] = v_rows + block * W * value_stride;
      lo[block] = 0;
      hi[block] = std::min(W, count - block * W);
      kt[block] = turned(k[block], stride, p.width, memory);
      if (gradients) vt[block] = turned(v[block], value_stride, p.value_width, memory);
    }
  }

  Blocks of(const float* const* at) const { return {at, lo, hi, blocks}; }

 private:
  static const float* turned(const float* rows, int stride, int width, Scratch& memory) {
    float* to = memory.take(W * width);
    const float* each[W];
    for (int e = 0; e < W; ++e) each[e] = rows + e * stride;
    lanes(each, width, to);
    return to;
  }
};

// Logits of a strip: products, and the bias or the mask of the lanes behind the last key.
void strip_logits(const Packed& packed, const float* q, int rows, int width, const float* bias, float* s) {
  const int lds = packed.blocks * W;
  scores(q, packed.stride, rows, packed.kt, packed.blocks, width, s, lds, bias ? bias : packed.mask, bias ? lds : 0);
}

// Asks for a part of a group's rows before its turn comes; all at once they would hold up the group at work.
void foresee_group(const GroupedProblem& p, const Groups& groups, int64_t item, int64_t part, int64_t parts) {
  const int64_t b = item / groups.count(), g = item % groups.count();
  const auto ask = [&](const Rows& from, const int32_t* rows, int64_t count, int64_t width) {
    for (int64_t j = count * part / parts; j < count * (part + 1) / parts; ++j)
      foresee(from, from.at(b, rows[j], 0), static_cast<int>(width));
  };
  ask(p.q, groups.q_rows.data() + groups.q_start[g], groups.queries(g), p.heads * p.width);
  ask(p.k, groups.k_rows.data() + groups.k_start[g], groups.keys(g), p.kv_heads * p.width);
  ask(p.v, groups.k_rows.data() + groups.k_start[g], groups.keys(g), p.kv_heads * p.value_width);
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
  parallel(p.batch * groups.count(), [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / groups.count(), g = item % groups.count();
      const int queries = groups.queries(g), keys = groups.keys(g), wide = padded(keys);
      if (queries == 0) continue;
      const int part = strip_rows(queries, wide / W);
      const int32_t* q_rows = groups.q_rows.data() + groups.q_start[g];
      const int64_t most = Stage::heads(p, queries, keys);
      for (int64_t first = 0; first < p.kv_heads; first += most) {
        const int64_t together = std::min(most, p.kv_heads - first);
        memory.reset(Stage::size(p, queries, keys, together) + Packed::size(p, keys, false) +
                     static_cast<size_t>(part) * (wide + value_stride));
        const Stage stage(p, groups, b, g, first, together, nullptr, memory);
        const auto mark = memory.mark();
        for (int64_t head = first * repeat; head < (first + together) * repeat; ++head) {
          memory.back_to(mark);
          if (together == p.kv_heads && item + 1 < end) foresee_group(p, groups, item + 1, head, p.heads);
          const int64_t kv = head / repeat - first;
          const Packed packed(p, keys, stage.k + kv * wide * stride, stage.v + kv * wide * value_stride, memory, false);
          float* s = memory.take(static_cast<size_t>(part) * wide);
          float* o = memory.take(part * value_stride);
          const float* bias = p.bias == nullptr ? nullptr
                                                : &tables.values[(p.bias_heads > 1 ? head : 0) * tables.per_head +
                                                                 tables.start[groups.pattern[g]]];
          for (int start = 0; start < queries; start += part) {
            const int here = std::min(part, queries - start);
            const float* q = stage.q + ((head - first * repeat) * queries + start) * stride;
            strip_logits(packed, q, here, p.width, bias ? bias + static_cast<int64_t>(start) * wide : nullptr, s);
            float totals[64], logs[64];
            std::fill_n(totals, here, kInf);  // a group without keys gives zeros
            std::fill_n(logs, here, -kInf);
            if (packed.blocks) softmax_rows(s, wide, here, packed.blocks, totals, logs);
            for (int i = 0; i < here; ++i) lse[(b * rows + q_rows[start + i]) * p.heads + head] = logs[i];
            mix(s, wide, here, packed.of(packed.v), value_stride, value_stride, o, value_stride);
            for (int i = 0; i < here; ++i)
              write(out, out.at(b, q_rows[start + i], head), p.value_width, o + i * value_stride, 1.f / totals[i]);
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
  const int64_t repeat = p.heads / p.kv_heads, per_part = p.bias_heads * tables.per_head;
  const int64_t items = p.batch * (groups.disjoint ? groups.count() : p.kv_heads);
  const int64_t parts = parts_with(items, bias_gradient ? per_part : 0);
  std::vector<float> table_gradients(bias_gradient ? parts * per_part : 0, 0.f);

  const auto some = [&](int64_t b, int64_t g, int64_t first_head, int64_t together, int64_t sums_of) {
    Scratch& memory = scratch();
    const int queries = groups.queries(g), keys = groups.keys(g), wide = padded(keys);
    const int part = queries ? strip_rows(queries, wide / W) : 0;
    const int32_t* q_rows = groups.q_rows.data() + groups.q_start[g];
    memory.reset(Stage::size(p, queries, keys, together) + Packed::size(p, keys, true) +
                 static_cast<size_t>(wide) * (stride + value_stride) + 4 * (wide / W) + 64 +
                 static_cast<size_t>(part) * (stride + 2 * wide));
    const Stage stage(p, groups, b, g, first_head, together, &out_gradient, memory);
    const auto mark = memory.mark();
    for (int64_t kv_head = first_head; kv_head < first_head + together; ++kv_head) {
      memory.back_to(mark);
      const int64_t kv = kv_head - first_head;
      const Packed packed(p, keys, stage.k + kv * wide * stride, stage.v + kv * wide * value_stride, memory, true);
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
      float* q_out = memory.take(part * stride);
      float* s = memory.take(static_cast<size_t>(part) * wide);
      float* ds = memory.take(static_cast<size_t>(part) * wide);
      for (int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
        const int64_t table = p.bias == nullptr ? 0
                                                : (p.bias_heads > 1 ? head : 0) * tables.per_head +
                                                      tables.start[groups.pattern[g]];
        for (int start = 0; start < queries; start += part) {
          const int here = std::min(part, queries - start);
          const int64_t corner = table + static_cast<int64_t>(start) * wide;
          const int64_t place = (head - first_head * repeat) * queries + start;
          const float* q = stage.q + place * stride;
          const float* go = stage.go + place * value_stride;
          if (packed.blocks) {
            strip_logits(packed, q, here, p.width, p.bias ? &tables.values[corner] : nullptr, s);
            scores(go, value_stride, here, packed.vt, packed.blocks, p.value_width, ds, wide);
            float logs[64];
            for (int i = 0; i < here; ++i) logs[i] = lse[(b * rows + q_rows[start + i]) * p.heads + head];
            softmax_gradient_rows(s, ds, wide, here, packed.blocks, logs);
            if (bias_gradient) {
              float* to = &table_gradients[sums_of * per_part + corner];
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
    }
  };

  // Groups that share keys are taken one after the other, so that sums have one order and no thread waits for another.
  const auto part_of_heads = [&](int64_t g) { return Stage::heads(p, groups.queries(g), groups.keys(g)); };
  if (groups.disjoint)
    parallel(items, parts, [&](int64_t begin, int64_t end, int64_t part) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / groups.count(), g = item % groups.count(), most = part_of_heads(g);
        for (int64_t head = 0; head < p.kv_heads; head += most) some(b, g, head, std::min(most, p.kv_heads - head), part);
      }
    });
  else
    parallel(items, parts, [&](int64_t begin, int64_t end, int64_t part) {
      for (int64_t item = begin; item < end; ++item)
        for (int64_t g = 0; g < groups.count(); ++g) some(item / p.kv_heads, g, item % p.kv_heads, 1, part);
    });

  if (bias_gradient == nullptr) return;
  parallel(p.bias_heads, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head)
      for (int64_t part = 0; part < parts; ++part)
        for (size_t pattern = 0; pattern < groups.example.size(); ++pattern) {
          const int64_t g = groups.example[pattern];
          const int keys = groups.keys(g), wide = padded(keys);
          const float* from = &table_gradients[part * per_part + head * tables.per_head + tables.start[pattern]];
          for (int i = 0; i < groups.queries(g); ++i)
            for (int j = 0; j < keys; ++j)
              bias_gradient[(head * p.slots + groups.q_slots[groups.q_start[g] + i]) * p.slots +
                            groups.k_slots[groups.k_start[g] + j]] += from[i * wide + j];
        }
  });
}

}  // namespace regard
