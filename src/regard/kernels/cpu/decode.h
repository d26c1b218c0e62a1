// Attention of a few queries over a long cache of keys: the keys are split, every part read once, the parts merged.
#pragma once
#include "core.h"

namespace regard {

struct DecodeProblem {
  int64_t batch, queries, keys, heads, kv_heads;
  int width, value_width;
  float scale;
  bool causal;  // query i sees keys up to i + keys - queries
  Rows q, k, v;
};

// lse: (batch, queries, heads).
void decode_forward(const DecodeProblem& problem, Rows out, float* lse);

// lse_gradient: as lse, or null.
void decode_backward(const DecodeProblem& problem, Rows out, const float* lse, Rows out_gradient,
                     const float* lse_gradient, Rows dq, Rows dk, Rows dv);

}  // namespace regard
