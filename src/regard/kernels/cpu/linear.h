// Causal linear attention, chunk by chunk, with a carried state and one rate of decay a head.
#pragma once
#include "core.h"

namespace regard {

struct LinearProblem {
  int64_t batch, length, heads, kv_heads;
  int width, value_width;
  bool normalize;
  float eps;
  Rows q, k, v;
  const float* decay;  // (heads), or null
};

// What a stream remembers: kv (batch, heads, width, value_width) and k (batch, heads, width); either may be null.
struct LinearMemory {
  float *kv, *k;
};

// totals: (batch, length, heads), the normaliser of each token, or null where it is not needed.
void linear_forward(const LinearProblem& problem, LinearMemory before, Rows out, float* totals, LinearMemory after);

// dk and dv: float32 and zeroed. `after_gradient` and `before_gradient` may hold nulls.
void linear_backward(const LinearProblem& problem, LinearMemory before, Rows out, const float* totals,
                     Rows out_gradient, LinearMemory after_gradient, Rows dq, Rows dk, Rows dv,
                     LinearMemory before_gradient);

}  // namespace regard
