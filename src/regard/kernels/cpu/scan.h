// The selective scan of Mamba (arXiv 2312.00752): one lane a channel, the states of a lane in registers or cache.
#pragma once
#include "core.h"

namespace regard {

struct ScanProblem {
  int64_t batch, length, channels;
  int states;
  const float *x, *dt, *a, *b, *c;  // (B, L, D), (B, L, D), (D, N), (B, L, N), (B, L, N)
  const float *skip, *before;       // (D) and (B, D, N), or null
};

struct ScanGradients {
  float *x, *dt, *a, *b, *c, *skip, *before;  // skip and before may be null; a, b, c and skip zeroed
};

// after: (B, D, N), or null.
void scan_forward(const ScanProblem& problem, float* y, float* after);

// after_gradient: (B, D, N), or null.
void scan_backward(const ScanProblem& problem, const float* y_gradient, const float* after_gradient,
                   ScanGradients gradients);

}  // namespace regard
