// Softmax attention inside groups of rows: windows, grids, stripes, ragged sets, routed blocks.
#pragma once
#include "core.h"

namespace regard {

// Which rows belong together. The lists hold for every batch element.
struct Groups {
  std::vector<int32_t> q_rows, k_rows;    // rows of all groups, end to end
  std::vector<int64_t> q_start, k_start;  // (groups + 1)
  bool disjoint = true;                   // no key stands in two groups
  // With a bias: the places of rows in the table, and which groups have equal places throughout.
  std::vector<int32_t> q_slots, k_slots, pattern, example;

  int64_t count() const { return static_cast<int64_t>(q_start.size()) - 1; }
  int queries(int64_t g) const { return static_cast<int>(q_start[g + 1] - q_start[g]); }
  int keys(int64_t g) const { return static_cast<int>(k_start[g + 1] - k_start[g]); }
};

struct GroupedProblem {
  int64_t batch, heads, kv_heads;
  int width, value_width;
  float scale;
  Rows q, k, v;
  const float* bias;  // (bias_heads, slots, slots), or null
  int64_t bias_heads, slots;
};

// Windows of `size` tokens that start at `shift`, or groups of `size` tokens spread over the map; what the edge cuts off
// or a shift would wrap around is a smaller group of its own.
Groups window_groups(const std::vector<int64_t>& spatial, const std::vector<int64_t>& size,
                     const std::vector<int64_t>& shift, bool grid);

// lse: (batch, rows, heads).
void grouped_forward(const GroupedProblem& problem, const Groups& groups, Rows out, float* lse, int64_t rows);

// dq, dk, dv as q, k, v; dk and dv float32 and zeroed where groups share keys. bias_gradient as bias, or null.
void grouped_backward(const GroupedProblem& problem, const Groups& groups, const float* lse, int64_t rows,
                      Rows out_gradient, Rows dq, Rows dk, Rows dv, float* bias_gradient);

}  // namespace regard
