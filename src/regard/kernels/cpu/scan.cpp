#include "scan.h"

namespace regard {
namespace {

constexpr int kSteps = 64;  // between the states that the backward pass keeps
constexpr int kTogether = 4;  // strips of W channels

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

// e^(dt a) from a times log2(e). Steep decays are 0 by a comparison: to underflow takes the processor a hundred times as
// long as to multiply.
template <bool Gentle>
inline vec decay(vec dt, vec rate) {
  if (Gentle) return power_of_two(dt, rate);
  const vec least = splat(-126.f), most = splat(4096.f);
  vec x = dt * rate;
  x = x > most ? most : x;
  return x < least ? vec{} : power_of_two(x < least ? least : x, splat(1.f));
}

// One strip of lanes on its way through time.
struct Walk {
  const ScanProblem& p;
  const Lanes lanes;
  float *rates, *h;  // [states][W]; rates are kept times log2(e)
  vec steepest{};    // the largest rate of each lane

  static size_t size(const ScanProblem& p) { return 2 * static_cast<size_t>(p.states) * W; }

  Walk(const ScanProblem& p, int64_t item, Scratch& memory) : p(p), lanes(p, item) {
    rates = memory.take(static_cast<size_t>(p.states) * W);
    h = memory.take(static_cast<size_t>(p.states) * W);
    to_lanes(p.a + lanes.channel * p.states, lanes.here, p.states, rates);
    to_lanes(p.before ? p.before + lanes.state(p) : nullptr, lanes.here, p.states, h);
    for (int n = 0; n < p.states; ++n) {
      const vec rate = load(rates + n * W) * splat(1.44269504f);
      store(rates + n * W, rate);
      steepest = larger(larger(rate, -rate), steepest);
    }
  }

  int64_t row(int64_t t) const { return (lanes.batch * p.length + t) * p.states; }
  vec x(int64_t t) const { return take(p.x + lanes.at(p, t), lanes.here); }
  vec dt(int64_t t) const { return take(p.dt + lanes.at(p, t), lanes.here); }
  vec skip() const { return p.skip ? take(p.skip + lanes.channel, lanes.here) : vec{}; }

  // Whether the exponents of some steps can be taken as they are.
  bool gentle(int64_t first, int64_t last) const {
    vec most{};
    for (int64_t t = first; t < last; ++t) most = larger(larger(dt(t), -dt(t)), most);
    return largest(most * steepest) < 126.f;
  }

  // Asks for the rows of a step to come, which lie far apart.
  void foresee(int64_t t) const {
    if (t >= p.length) return;
    __builtin_prefetch(p.dt + lanes.at(p, t), 0, 3);
    __builtin_prefetch(p.x + lanes.at(p, t), 0, 3);
  }

  // h = e^(dt a) h + dt x b and y = c h + skip x over some steps; N is the number of states, 0 if not known.
  template <int N, bool Gentle>
  void advance(int64_t first, int64_t last, vec skip, float* y) {
    const int count = N ? N : p.states;
    vec held[N ? N : 1];
    for (int n = 0; n < N; ++n) held[n] = load(h + n * W);
    for (int64_t t = first; t < last; ++t) {
      const float *b = p.b + row(t), *c = p.c + row(t);
      const vec step = dt(t), entering = step * x(t);
      vec sums = skip * x(t);
      foresee(t + kSteps);
#pragma GCC unroll 16
      for (int n = 0; n < count; ++n) {
        const vec next = decay<Gentle>(step, load(rates + n * W)) * (N ? held[n] : load(h + n * W)) + entering * splat(b[n]);
        N ? void(held[n] = next) : store(h + n * W, next);
        sums += next * splat(c[n]);
      }
      if (y) give(y + lanes.at(p, t), sums, lanes.here);
    }
    for (int n = 0; n < N; ++n) store(h + n * W, held[n]);
  }

  void advance(int64_t first, int64_t last, vec skip, float* y) {
    const bool known = p.states == 16;
    if (gentle(first, last))
      known ? advance<16, true>(first, last, skip, y) : advance<0, true>(first, last, skip, y);
    else
      advance<0, false>(first, last, skip, y);
  }

  // The same without y; the state before each step and its decays are written down.
  template <bool Gentle>
  void advance_and_keep(int64_t first, int64_t last, float* before, float* decays) {
    for (int64_t t = first; t < last; ++t) {
      const float* b = p.b + row(t);
      const vec step = dt(t), entering = step * x(t);
      for (int n = 0; n < p.states; ++n, before += W, decays += W) {
        const vec was = load(h + n * W), fade = decay<Gentle>(step, load(rates + n * W));
        store(before, was);
        store(decays, fade);
        store(h + n * W, fade * was + entering * splat(b[n]));
      }
    }
  }
};

// to[e] += the sum of terms[e] over its lanes, for the first `some` of them.
inline void add_sums(vec (&terms)[W], int some, float* to) {
  give(to, take(to, some) + sums_of(terms), some);
}

}  // namespace

// Strips of neighbouring channels go through time together, so that more of a row is read while its page is at hand.
void scan_forward(const ScanProblem& p, float* y, float* after) {
  const int64_t strips = (p.channels + W - 1) / W;
  const int64_t together = std::clamp<int64_t>(p.batch * strips / (2 * threads()), 1, kTogether);
  const int64_t groups = (strips + together - 1) / together;
  parallel(p.batch * groups, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / groups, first = item % groups * together, last = std::min(strips, first + together);
      memory.reset(Walk::size(p) * together);
      std::vector<Walk> walks;
      for (int64_t strip = first; strip < last; ++strip) walks.emplace_back(p, b * strips + strip, memory);
      for (int64_t t = 0; t < p.length; t += kSteps)
        for (Walk& walk : walks) walk.advance(t, std::min(p.length, t + kSteps), walk.skip(), y);
      if (after)
        for (const Walk& walk : walks)
          from_lanes(walk.h, walk.lanes.here, p.states, after + walk.lanes.state(p));
    }
  });
}

void scan_backward(const ScanProblem& p, const float* y_gradient, const float* after_gradient, ScanGradients g) {
  const int64_t items = p.batch * ((p.channels + W - 1) / W), chunks = (p.length + kSteps - 1) / kSteps;
  const size_t states = static_cast<size_t>(p.states) * W, rows = static_cast<size_t>(p.batch * p.length * p.states);
  const size_t row = p.states;
  // Sums over channels and batch go through one buffer a part: every sum has one order for a number of threads.
  std::vector<std::vector<float>> partial(threads());
  parallel(items, threads(), [&](int64_t begin, int64_t end, int64_t part) {
    Scratch& memory = scratch();
    std::vector<float>& mine = partial[part];
    mine.resize(2 * rows + p.channels * (row + 1), 0.f);
    float *b_sums = mine.data(), *c_sums = b_sums + rows, *a_sums = c_sums + rows, *skip_sums = a_sums + p.channels * row;
    for (int64_t item = begin; item < end; ++item) {
      memory.reset(Walk::size(p) + states * (3 + chunks + 2 * kSteps));
      Walk walk(p, item, memory);
      const Lanes& lanes = walk.lanes;
      float* a = memory.take(states);
      float* dh = memory.take(states);
      float* da = memory.take(states);
      float* kept = memory.take(states * chunks);       // the state before each chunk
      float* before = memory.take(states * kSteps);     // the state before each step of a chunk
      float* decays = memory.take(states * kSteps);
      to_lanes(p.a + lanes.channel * p.states, lanes.here, p.states, a);
      to_lanes(after_gradient ? after_gradient + lanes.state(p) : nullptr, lanes.here, p.states, dh);
      std::fill_n(da, states, 0.f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        std::copy_n(walk.h, states, kept + chunk * states);
        if (chunk + 1 < chunks) walk.advance(chunk * kSteps, (chunk + 1) * kSteps, vec{}, nullptr);
      }
      vec skip_gradient{};
      const vec skip = walk.skip();
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t first = chunk * kSteps, last = std::min(p.length, first + kSteps);
        std::copy_n(kept + chunk * states, states, walk.h);
        walk.gentle(first, last) ? walk.advance_and_keep<true>(first, last, before, decays)
                                 : walk.advance_and_keep<false>(first, last, before, decays);
        for (int64_t t = last - 1; t >= first; --t) {
          const int64_t at = lanes.at(p, t), place = walk.row(t);
          const float *b = p.b + place, *c = p.c + place, *old = before + (t - first) * states,
                      *fades = decays + (t - first) * states;
          const vec x = walk.x(t), dt = walk.dt(t), dy = take(y_gradient + at, lanes.here), entering = dt * x;
          vec through{}, fading{};  // sums over states of dh b, and of dh h_before decay a
          for (int start = 0; start < p.states; start += W) {
            const int some = std::min(W, p.states - start);
            vec to_b[W], to_c[W];
            for (int e = 0; e < some; ++e) {
              const int n = start + e;
              const vec fade = load(fades + n * W), was = load(old + n * W), now = fade * was + entering * splat(b[n]);
              const vec grad = load(dh + n * W) + dy * splat(c[n]), moved = grad * was * fade;
              to_c[e] = dy * now;
              to_b[e] = grad * entering;
              through += grad * splat(b[n]);
              fading += moved * load(a + n * W);
              store(da + n * W, load(da + n * W) + moved * dt);
              store(dh + n * W, grad * fade);
            }
            for (int e = some; e < W; ++e) to_b[e] = to_c[e] = vec{};
            add_sums(to_b, some, b_sums + place + start);
            add_sums(to_c, some, c_sums + place + start);
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
