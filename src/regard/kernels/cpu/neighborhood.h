// Softmax attention over neighborhoods in one, two and three dimensions: strided, dilated, causal, with relative bias.
#pragma once
#include "core.h"

namespace regard {

// What the tokens of one axis see: keys first, first + gap, ... (count of them).
struct Axis {
  int64_t length, kernel, gap;
  std::vector<int32_t> first, count, ranks;

  Axis(int64_t length, int64_t kernel, int64_t stride, int64_t gap, bool causal);
  int32_t rank(int64_t position) const { return ranks[position]; }
};

struct NeighborhoodProblem {
  int64_t batch, heads, kv_heads;
  int width, value_width;
  float scale;
  Rows q, k, v;
  const float* bias;       // (heads, 2 kernel - 1, ...), or null
  std::vector<Axis> axes;  // three of them, outer ones of length 1 in front
};

void neighborhood_forward(const NeighborhoodProblem& problem, Rows out, float* lse);

// dk and dv: float32 and zeroed. lse_gradient and bias_gradient may be null.
void neighborhood_backward(const NeighborhoodProblem& problem, const float* lse, Rows out_gradient,
                           const float* lse_gradient, Rows dq, Rows dk, Rows dv, float* bias_gradient);

}  // namespace regard
