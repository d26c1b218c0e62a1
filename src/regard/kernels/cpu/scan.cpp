#include "scan.h"

namespace regard {
namespace {

constexpr int kSteps = 64;  // between the states that the backward pass keeps

// W channels of a row, the last ones perhaps not there.
inline vec take(const float* from, int here) {
  if (here == W) return load(from);
  vec x{};
  for (int e = 0; e < here; ++e) x[e] = from[e];
  return x;
}
inline void give(float* to, vec x, int here) {
  if (here == W) return store(to, x);
  for (int e = 0; e < here; ++e) to[e] = x[e];
}

// (channels, states) to one vector of channels for each state, and back.
void to_lanes(const float* from, int here, int states, float* to) {
  for (int n = 0; n < states; ++n)
    for (int e = 0; e < W; ++e) to[n * W + e] = from && e < here ? from[e * states + n] : 0;
}
void from_lanes(const float* from, int here, int states, float* to) {
  for (int n = 0; n < states; ++n)
    for (int e = 0; e < here; ++e) to[e * states + n] = from[n * W + e];
}

struct Lanes {
  int64_t batch, channel;
  int here;

  Lanes(const ScanProblem& p, int64_t item) {
    const int64_t blocks = (p.channels + W - 1) / W;
    batch = item / blocks;
    channel = item % blocks * W;
    here = static_cast<int>(std::min<int64_t>(W, p.channels - channel));
  }
  int64_t at(const ScanProblem& p, int64_t t) const { return (batch * p.length + t) * p.channels + channel; }
  int64_t state(const ScanProblem& p) const { return (batch * p.channels + channel) * p.states; }
};

// One step of all states: h = e^(dt a) h + dt x b; returns the sum of c h. N is the number of states, 0 if not known.
template <int N>
inline vec step(int states, float* h, const float* a, vec dt, vec x, const float* b, const float* c) {
  const int count = N ? N : states;
  const vec entering = dt * x;
  vec y{};
#pragma GCC unroll 4
  for (int n = 0; n < count; ++n) {
    const vec next = exp(dt * load(a + n * W)) * load(h + n * W) + entering * splat(b[n]);
    store(h + n * W, next);
    y += next * splat(c[n]);
  }
  return y;
}

template <int N>
void run(const ScanProblem& p, const Lanes& lanes, const float* a, float* h, float* y) {
  const vec skip = p.skip ? take(p.skip + lanes.channel, lanes.here) : vec{};
  for (int64_t t = 0; t < p.length; ++t) {
    const int64_t at = lanes.at(p, t), row = (lanes.batch * p.length + t) * p.states;
    const vec x = take(p.x + at, lanes.here), dt = take(p.dt + at, lanes.here);
    give(y + at, step<N>(p.states, h, a, dt, x, p.b + row, p.c + row) + skip * x, lanes.here);
  }
}

}  // namespace

void scan_forward(const ScanProblem& p, float* y, float* after) {
  const int64_t items = p.batch * ((p.channels + W - 1) / W);
  parallel(items, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const Lanes lanes(p, item);
      memory.reset(2 * p.states * W);
      float* a = memory.take(p.states * W);
      float* h = memory.take(p.states * W);
      to_lanes(p.a + lanes.channel * p.states, lanes.here, p.states, a);
      to_lanes(p.before ? p.before + lanes.state(p) : nullptr, lanes.here, p.states, h);
      (p.states == 16 ? run<16> : run<0>)(p, lanes, a, h, y);
      if (after) from_lanes(h, lanes.here, p.states, after + lanes.state(p));
    }
  });
}

void scan_backward(const ScanProblem& p, const float* y_gradient, const float* after_gradient, ScanGradients g) {
  const int64_t items = p.batch * ((p.channels + W - 1) / W), chunks = (p.length + kSteps - 1) / kSteps;
  const size_t states = static_cast<size_t>(p.states) * W, rows = static_cast<size_t>(p.batch * p.length * p.states);
  const size_t row = p.states;
  // Sums over channels and batch go through one buffer a thread: every sum has one order for a number of threads.
  std::vector<std::vector<float>> partial(threads());
  parallel(items, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    std::vector<float>& mine = partial[this_thread()];
    mine.resize(2 * rows + p.channels * (row + 1), 0.f);
    float *b_sums = mine.data(), *c_sums = b_sums + rows, *a_sums = c_sums + rows, *skip_sums = a_sums + p.channels * row;
    for (int64_t item = begin; item < end; ++item) {
      const Lanes lanes(p, item);
      memory.reset(states * (4 + chunks + 2 * kSteps));
      float* a = memory.take(states);
      float* h = memory.take(states);
      float* dh = memory.take(states);
      float* da = memory.take(states);
      float* kept = memory.take(states * chunks);       // the state before each chunk
      float* before = memory.take(states * kSteps);     // the state before each step of a chunk
      float* decay = memory.take(states * kSteps);
      to_lanes(p.a + lanes.channel * p.states, lanes.here, p.states, a);
      to_lanes(p.before ? p.before + lanes.state(p) : nullptr, lanes.here, p.states, h);
      to_lanes(after_gradient ? after_gradient + lanes.state(p) : nullptr, lanes.here, p.states, dh);
      std::fill_n(da, states, 0.f);
      const auto advance = [&](int64_t t, float* save_decay) {
        const int64_t at = lanes.at(p, t);
        const float* b = p.b + (lanes.batch * p.length + t) * p.states;
        const vec dt = take(p.dt + at, lanes.here), entering = dt * take(p.x + at, lanes.here);
        for (int n = 0; n < p.states; ++n) {
          const vec fade = exp(dt * load(a + n * W));
          if (save_decay) store(save_decay + n * W, fade);
          store(h + n * W, fade * load(h + n * W) + entering * splat(b[n]));
        }
      };
      for (int64_t t = 0; t < p.length; ++t) {
        if (t % kSteps == 0) std::copy_n(h, states, kept + t / kSteps * states);
        advance(t, nullptr);
      }
      vec skip_gradient{};
      const vec skip = p.skip ? take(p.skip + lanes.channel, lanes.here) : vec{};
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t first = chunk * kSteps, last = std::min(p.length, first + kSteps);
        std::copy_n(kept + chunk * states, states, h);
        for (int64_t t = first; t < last; ++t) {
          std::copy_n(h, states, before + (t - first) * states);
          advance(t, decay + (t - first) * states);
        }
        for (int64_t t = last - 1; t >= first; --t) {
          const int64_t at = lanes.at(p, t), place = (lanes.batch * p.length + t) * p.states;
          const float *b = p.b + place, *c = p.c + place, *old = before + (t - first) * states,
                      *fades = decay + (t - first) * states;
          const vec x = take(p.x + at, lanes.here), dt = take(p.dt + at, lanes.here), dy = take(y_gradient + at, lanes.here);
          const vec entering = dt * x;
          vec through{}, fading{};  // sums over states of dh b, and of dh h_before decay a
          for (int n = 0; n < p.states; ++n) {
            const vec fade = load(fades + n * W), was = load(old + n * W), now = fade * was + entering * splat(b[n]);
            const vec grad = load(dh + n * W) + dy * splat(c[n]);
            const vec moved = grad * was * fade;
            c_sums[place + n] += sum(dy * now);
            b_sums[place + n] += sum(grad * entering);
            through += grad * splat(b[n]);
            fading += moved * load(a + n * W);
            store(da + n * W, load(da + n * W) + moved * dt);
            store(dh + n * W, grad * fade);
          }
          give(g.x + at, dt * through + skip * dy, lanes.here);
          give(g.dt + at, x * through + fading, lanes.here);
          skip_gradient += dy * x;
        }
      }
      if (g.before) from_lanes(dh, lanes.here, p.states, g.before + lanes.state(p));
      for (int e = 0; e < lanes.here; ++e) {
        for (int n = 0; n < p.states; ++n) a_sums[(lanes.channel + e) * row + n] += da[n * W + e];
        skip_sums[lanes.channel + e] += skip_gradient[e];
      }
    }
  });
  const auto total = [&](float* to, size_t offset, size_t count) {
    for (const std::vector<float>& mine : partial)
      for (size_t i = 0; i < (mine.empty() ? 0 : count); ++i) to[i] += mine[offset + i];
  };
  total(g.b, 0, rows);
  total(g.c, rows, rows);
  total(g.a, 2 * rows, p.channels * row);
  if (g.skip) total(g.skip, 2 * rows + p.channels * row, p.channels);
}

}  // namespace regard
