// The kernels as PyTorch operators: checks of layout, memory for the results, PyTorch's threads.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "decode.h"
#include "grouped.h"
#include "linear.h"
#include "neighborhood.h"
#include "scan.h"

namespace regard {

void parallel(int64_t n, int64_t parts, const std::function<void(int64_t, int64_t, int64_t)>& body) {
  parts = std::min(parts, n);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(parts, threads()), 1, [&](int64_t, int64_t) {
    for (int64_t part = next++; part < parts; part = next++) body(n * part / parts, n * (part + 1) / parts, part);
  });
}
int threads() { return at::get_num_threads(); }
bool poison() {
  return at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
}

namespace {

using at::Tensor;
using Sizes = at::IntArrayRef;

// (batch, *spatial, heads, width) with spatial axes that can be walked with one stride, channels next to each other.
Tensor walkable(const Tensor& x) {
  bool good = x.stride(-1) == 1 || x.size(-1) == 1;
  for (int64_t axis = 1; axis + 3 < x.dim(); ++axis)
    good = good && x.stride(axis) == x.stride(axis + 1) * x.size(axis + 1);
  return good ? x : x.contiguous();
}

Rows rows_of(const Tensor& x) {
  const int64_t bytes = x.element_size();
  return {static_cast<char*>(x.data_ptr()), x.scalar_type() == at::kBFloat16, x.stride(0) * bytes,
          x.stride(-3) * bytes, x.stride(-2) * bytes};
}

int64_t tokens(const Tensor& x) {
  int64_t n = 1;
  for (int64_t axis = 1; axis + 2 < x.dim(); ++axis) n *= x.size(axis);
  return n;
}

std::vector<int64_t> spatial(const Tensor& x) { return x.sizes().slice(1, x.dim() - 3).vec(); }

// Memory not written yet. Where the system gives huge pages it comes in these: the first write to a small page costs more
// than what these kernels compute for it.
Tensor fresh(Sizes sizes, const at::TensorOptions& options) {
  const Tensor x = at::empty(sizes, options);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (start + page - 1) / page * page, last = (start + x.nbytes()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

Tensor zeros(Sizes sizes, const at::TensorOptions& options) { return fresh(sizes, options).zero_(); }

Tensor like_queries(const Tensor& q, int64_t width) {
  auto sizes = q.sizes().vec();
  sizes.back() = width;
  return fresh(sizes, q.options());
}

Tensor of_rows(const Tensor& q) { return fresh(q.sizes().slice(0, q.dim() - 1), q.options().dtype(at::kFloat)); }

GroupedProblem grouped_problem(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return {q.size(0), q.size(-2), k.size(-2), static_cast<int>(q.size(-1)), static_cast<int>(v.size(-1)),
          static_cast<float>(scale), rows_of(q), rows_of(k), rows_of(v), nullptr, 0, 0};
}

void add_bias(GroupedProblem& problem, const Tensor& bias) {
  problem.bias = bias.const_data_ptr<float>();
  problem.bias_heads = bias.size(0);
  problem.slots = bias.size(-1);
}

Tensor in_full(const std::optional<Tensor>& bias) { return bias ? bias->to(at::kFloat).contiguous() : Tensor(); }

float* numbers(const Tensor& x) { return x.defined() && x.numel() > 0 ? x.mutable_data_ptr<float>() : nullptr; }

std::tuple<Tensor, Tensor> window_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                            const std::optional<Tensor>& bias_, Sizes size, Sizes shift, bool grid,
                                            double scale) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_), bias = in_full(bias_);
  const Tensor out = like_queries(q, v.size(-1)), lse = of_rows(q);
  if (out.numel() == 0) return {out, lse};
  GroupedProblem problem = grouped_problem(q, k, v, scale);
  if (bias.defined()) add_bias(problem, bias);
  const Groups groups = window_groups(spatial(q), size.vec(), shift.vec(), grid);
  grouped_forward(problem, groups, rows_of(out), lse.mutable_data_ptr<float>(), tokens(q));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& gradient_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& bias_,
    const Tensor& lse, Sizes size, Sizes shift, bool grid, double scale) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_), bias = in_full(bias_);
  const Tensor gradient = walkable(gradient_);
  const Tensor dq = like_queries(q, q.size(-1)), dk = like_queries(k, k.size(-1)), dv = like_queries(v, v.size(-1));
  const Tensor db = bias.defined() ? zeros(bias.sizes(), bias.options()) : at::empty({0}, q.options());
  if (dq.numel() + dv.numel() > 0) {
    GroupedProblem problem = grouped_problem(q, k, v, scale);
    if (bias.defined()) add_bias(problem, bias);
    const Groups groups = window_groups(spatial(q), size.vec(), shift.vec(), grid);
    grouped_backward(problem, groups, lse.const_data_ptr<float>(), tokens(q), rows_of(gradient),
                     rows_of(dq), rows_of(dk), rows_of(dv), numbers(db));
  }
  return {dq, dk, dv, db};
}

NeighborhoodProblem neighborhood_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                         Sizes kernel, Sizes stride, Sizes dilation, Sizes causal, double scale) {
  NeighborhoodProblem problem{q.size(0), q.size(-2), k.size(-2), static_cast<int>(q.size(-1)),
                              static_cast<int>(v.size(-1)), static_cast<float>(scale), rows_of(q), rows_of(k),
                              rows_of(v), bias.defined() ? bias.const_data_ptr<float>() : nullptr, {}};
  const size_t axes = kernel.size();
  for (size_t a = axes; a < 3; ++a) problem.axes.emplace_back(1, 1, 1, 1, false);
  for (size_t a = 0; a < axes; ++a)
    problem.axes.emplace_back(q.size(static_cast<int64_t>(a) + 1), kernel[a], stride[a], dilation[a], causal[a] != 0);
  return problem;
}

std::tuple<Tensor, Tensor> neighborhood_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                                  const std::optional<Tensor>& bias_, Sizes kernel, Sizes stride,
                                                  Sizes dilation, Sizes causal, double scale) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_), bias = in_full(bias_);
  const Tensor out = like_queries(q, v.size(-1)), lse = of_rows(q);
  if (out.numel() == 0) return {out, lse};
  neighborhood_forward(neighborhood_problem(q, k, v, bias, kernel, stride, dilation, causal, scale), rows_of(out),
                       lse.mutable_data_ptr<float>());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> neighborhood_attention_backward(
    const Tensor& gradient_, const std::optional<Tensor>& lse_gradient_, const Tensor& q_, const Tensor& k_,
    const Tensor& v_, const std::optional<Tensor>& bias_, const Tensor& lse, Sizes kernel,
    Sizes stride, Sizes dilation, Sizes causal, double scale) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_), bias = in_full(bias_);
  const Tensor gradient = walkable(gradient_), lse_gradient = in_full(lse_gradient_);
  const Tensor dq = like_queries(q, q.size(-1));
  const Tensor dk = zeros(k.sizes(), k.options().dtype(at::kFloat));
  const Tensor dv = zeros(v.sizes(), v.options().dtype(at::kFloat));
  const Tensor db = bias.defined() ? zeros(bias.sizes(), bias.options()) : at::empty({0}, lse.options());
  if (dq.numel() + dv.numel() > 0)
    neighborhood_backward(neighborhood_problem(q, k, v, bias, kernel, stride, dilation, causal, scale),
                          lse.const_data_ptr<float>(), rows_of(gradient),
                          numbers(lse_gradient), rows_of(dq), rows_of(dk), rows_of(dv), numbers(db));
  return {dq, dk.to(k.scalar_type()), dv.to(v.scalar_type()), db};
}

// Ragged groups: rows offsets[g] to offsets[g + 1] attend to keys key_offsets[g] to key_offsets[g + 1].
Groups ragged_groups(const Tensor& offsets, const Tensor& key_offsets, int64_t queries, int64_t keys) {
  Groups groups;
  const auto fill = [](const Tensor& from, int64_t count, std::vector<int32_t>& rows, std::vector<int64_t>& start) {
    const Tensor plain = from.to(at::kLong).contiguous();
    start.assign(plain.const_data_ptr<int64_t>(), plain.const_data_ptr<int64_t>() + plain.numel());
    TORCH_CHECK_VALUE(!start.empty() && start.front() == 0 && start.back() == count &&
                          std::is_sorted(start.begin(), start.end()),
                      "offsets must rise from 0 to the number of rows, ", count, ".");
    rows.resize(start.back());
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
  };
  fill(offsets, queries, groups.q_rows, groups.q_start);
  fill(key_offsets, keys, groups.k_rows, groups.k_start);
  TORCH_CHECK_VALUE(groups.q_start.size() == groups.k_start.size(), "offsets and key_offsets must hold as many groups.");
  return groups;
}

// Routed blocks: the queries of block g attend to the keys of the blocks index[g]. Batch elements differ, so the batch
// is part of the rows.
Groups routed_groups(const Tensor& q, const Tensor& k, const Tensor& index_) {
  Groups groups;
  groups.disjoint = false;
  const Tensor index = index_.to(at::kLong).contiguous();
  const int64_t* chosen = index.const_data_ptr<int64_t>();
  const int64_t batch = q.size(0), blocks = q.size(1), queries = q.size(2), key_blocks = k.size(1), keys = k.size(2);
  groups.q_start.push_back(0);
  groups.k_start.push_back(0);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0; g < blocks; ++g) {
      for (int64_t i = 0; i < queries; ++i)
        groups.q_rows.push_back(static_cast<int32_t>((b * blocks + g) * queries + i));
      for (int64_t n = 0; n < index.size(2); ++n) {
        const int64_t block = chosen[(b * blocks + g) * index.size(2) + n];
        TORCH_CHECK_VALUE(block >= 0 && block < key_blocks, "index must name blocks of keys, 0 to ", key_blocks - 1,
                          ", got ", block, ".");
        for (int64_t j = 0; j < keys; ++j)
          groups.k_rows.push_back(static_cast<int32_t>((b * key_blocks + block) * keys + j));
      }
      groups.q_start.push_back(static_cast<int64_t>(groups.q_rows.size()));
      groups.k_start.push_back(static_cast<int64_t>(groups.k_rows.size()));
    }
  return groups;
}

// q, k, v: (rows, heads, width) as (1, rows, heads, width).
std::tuple<Tensor, Tensor> attend_groups(const Tensor& q, const Tensor& k, const Tensor& v, const Groups& groups,
                                         double scale) {
  const Tensor out = like_queries(q, v.size(-1)), lse = of_rows(q);
  if (out.numel() > 0)
    grouped_forward(grouped_problem(q, k, v, scale), groups, rows_of(out), lse.mutable_data_ptr<float>(), q.size(1));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attend_groups_backward(const Tensor& gradient, const Tensor& q, const Tensor& k,
                                                          const Tensor& v, const Tensor& lse,
                                                          const Groups& groups, double scale) {
  const auto type = groups.disjoint ? k.scalar_type() : at::kFloat;
  const Tensor dq = like_queries(q, q.size(-1));
  const Tensor dk = zeros(k.sizes(), k.options().dtype(type)), dv = zeros(v.sizes(), v.options().dtype(type));
  if (dq.numel() + dv.numel() > 0)
    grouped_backward(grouped_problem(q, k, v, scale), groups, lse.const_data_ptr<float>(), q.size(1),
                     rows_of(gradient), rows_of(dq), rows_of(dk), rows_of(dv), nullptr);
  return {dq, dk.to(k.scalar_type()), dv.to(v.scalar_type())};
}

Tensor one_batch(const Tensor& x) { return walkable(x.unsqueeze(0)); }
Tensor all_rows(const Tensor& x) { return x.contiguous().view({1, -1, x.size(-2), x.size(-1)}); }

std::tuple<Tensor, Tensor> grouped_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                                             const Tensor& key_offsets, double scale) {
  const auto [out, lse] =
      attend_groups(one_batch(q), one_batch(k), one_batch(v),
                    ragged_groups(offsets, key_offsets, q.size(0), k.size(0)), scale);
  return {out.squeeze(0), lse.squeeze(0)};
}

std::tuple<Tensor, Tensor, Tensor> grouped_attention_backward(const Tensor& gradient, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& offsets,
                                                              const Tensor& key_offsets, const Tensor& lse,
                                                              double scale) {
  const auto [dq, dk, dv] =
      attend_groups_backward(one_batch(gradient), one_batch(q), one_batch(k), one_batch(v), lse.unsqueeze(0),
                             ragged_groups(offsets, key_offsets, q.size(0), k.size(0)), scale);
  return {dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)};
}

std::tuple<Tensor, Tensor> routed_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index,
                                            double scale) {
  const auto [out, lse] = attend_groups(all_rows(q), all_rows(k), all_rows(v), routed_groups(q, k, index), scale);
  auto sizes = q.sizes().vec();
  sizes.back() = v.size(-1);
  return {out.view(sizes), lse.view(q.sizes().slice(0, 4))};
}

std::tuple<Tensor, Tensor, Tensor> routed_attention_backward(const Tensor& gradient, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& index, const Tensor& lse,
                                                             double scale) {
  const auto [dq, dk, dv] =
      attend_groups_backward(all_rows(gradient), all_rows(q), all_rows(k), all_rows(v),
                             lse.contiguous().view({1, -1, q.size(-2)}), routed_groups(q, k, index), scale);
  return {dq.view(q.sizes()), dk.view(k.sizes()), dv.view(v.sizes())};
}

DecodeProblem decode_problem(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale) {
  return {q.size(0), tokens(q), tokens(k), q.size(-2), k.size(-2), static_cast<int>(q.size(-1)),
          static_cast<int>(v.size(-1)), static_cast<float>(scale), causal, rows_of(q), rows_of(k), rows_of(v)};
}

std::tuple<Tensor, Tensor> decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal,
                                            double scale) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_);
  const Tensor out = like_queries(q, v.size(-1)), lse = of_rows(q);
  if (out.numel() > 0)
    decode_forward(decode_problem(q, k, v, causal, scale), rows_of(out), lse.mutable_data_ptr<float>());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> decode_attention_backward(const Tensor& gradient_,
                                                             const std::optional<Tensor>& lse_gradient_,
                                                             const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                                             const Tensor& out, const Tensor& lse, bool causal,
                                                             double scale) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_);
  const Tensor gradient = walkable(gradient_), lse_gradient = in_full(lse_gradient_);
  const Tensor dq = like_queries(q, q.size(-1)), dk = like_queries(k, k.size(-1)), dv = like_queries(v, v.size(-1));
  if (out.numel() > 0)
    decode_backward(decode_problem(q, k, v, causal, scale), rows_of(out), lse.const_data_ptr<float>(),
                    rows_of(gradient), numbers(lse_gradient), rows_of(dq), rows_of(dk), rows_of(dv));
  return {dq, dk, dv};
}

LinearProblem linear_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay, bool normalize,
                             double eps) {
  return {q.size(0), q.size(1), q.size(2), k.size(2), static_cast<int>(q.size(3)), static_cast<int>(v.size(3)),
          normalize, static_cast<float>(eps), rows_of(q), rows_of(k), rows_of(v), numbers(decay)};
}

// `keep`: also the normaliser of each token, for the backward pass.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                                            const std::optional<Tensor>& decay_,
                                                            const std::optional<Tensor>& state_kv_,
                                                            const std::optional<Tensor>& state_k_, bool normalize,
                                                            double eps, bool keep) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_);
  const Tensor decay = in_full(decay_), state_kv = in_full(state_kv_), state_k = in_full(state_k_);
  const auto full = q.options().dtype(at::kFloat);
  const Tensor out = like_queries(q, v.size(3)), totals = keep && normalize ? of_rows(q) : at::empty({0}, full);
  const Tensor after_kv = zeros({q.size(0), q.size(2), q.size(3), v.size(3)}, full);
  const Tensor after_k = zeros({q.size(0), q.size(2), q.size(3)}, full);
  if (out.numel() > 0)
    linear_forward(linear_problem(q, k, v, decay, normalize, eps), {numbers(state_kv), numbers(state_k)}, rows_of(out),
                   numbers(totals), {numbers(after_kv), numbers(after_k)});
  return {out, after_kv, after_k, totals};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    const Tensor& gradient_, const std::optional<Tensor>& kv_gradient_, const std::optional<Tensor>& k_gradient_,
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& decay_,
    const std::optional<Tensor>& state_kv_, const std::optional<Tensor>& state_k_, const Tensor& out,
    const Tensor& totals, bool normalize, double eps) {
  const Tensor q = walkable(q_), k = walkable(k_), v = walkable(v_), gradient = walkable(gradient_);
  const Tensor decay = in_full(decay_), state_kv = in_full(state_kv_), state_k = in_full(state_k_);
  const Tensor kv_gradient = in_full(kv_gradient_), k_gradient = in_full(k_gradient_);
  const auto full = q.options().dtype(at::kFloat);
  const Tensor dq = like_queries(q, q.size(3)), dk = zeros(k.sizes(), full), dv = zeros(v.sizes(), full);
  const Tensor before_kv = zeros({q.size(0), q.size(2), q.size(3), v.size(3)}, full);
  const Tensor before_k = zeros({q.size(0), q.size(2), q.size(3)}, full);
  if (dq.numel() > 0)
    linear_backward(linear_problem(q, k, v, decay, normalize, eps), {numbers(state_kv), numbers(state_k)}, rows_of(out),
                    numbers(totals), rows_of(gradient), {numbers(kv_gradient), numbers(k_gradient)}, rows_of(dq),
                    rows_of(dk), rows_of(dv), {numbers(before_kv), numbers(before_k)});
  return {dq, dk.to(k.scalar_type()), dv.to(v.scalar_type()), before_kv, before_k};
}

struct ScanInputs {
  Tensor x, dt, a, b, c, skip, state;

  ScanInputs(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c,
             const std::optional<Tensor>& skip, const std::optional<Tensor>& state)
      : x(in_full(x)), dt(in_full(dt)), a(in_full(a)), b(in_full(b)), c(in_full(c)), skip(in_full(skip)),
        state(in_full(state)) {}
  ScanProblem problem() const {
    return {x.size(0), x.size(1), x.size(2), static_cast<int>(a.size(1)), numbers(x), numbers(dt), numbers(a),
            numbers(b), numbers(c), numbers(skip), numbers(state)};
  }
  Tensor zeros_of_state() const { return zeros({x.size(0), x.size(2), a.size(1)}, x.options()); }
};

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b,
                                          const Tensor& c, const std::optional<Tensor>& skip,
                                          const std::optional<Tensor>& state) {
  const ScanInputs in(x, dt, a, b, c, skip, state);
  const Tensor y = fresh(in.x.sizes(), in.x.options()), after = in.zeros_of_state();
  if (y.numel() > 0) scan_forward(in.problem(), numbers(y), numbers(after));
  return {y.to(x.scalar_type()), after};
}

std::vector<Tensor> selective_scan_backward(const Tensor& gradient, const std::optional<Tensor>& after_gradient,
                                            const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b,
                                            const Tensor& c, const std::optional<Tensor>& skip,
                                            const std::optional<Tensor>& state) {
  const ScanInputs in(x, dt, a, b, c, skip, state);
  const Tensor dy = in_full(gradient), after = in_full(after_gradient);
  const auto none = [](const Tensor& like) { return zeros(like.sizes(), like.options()); };
  const Tensor dx = none(in.x), ddt = none(in.dt), da = none(in.a), db = none(in.b), dc = none(in.c);
  const Tensor dskip = zeros({in.x.size(2)}, in.x.options()), before = in.zeros_of_state();
  if (dx.numel() > 0)
    scan_backward(in.problem(), numbers(dy), numbers(after),
                  {numbers(dx), numbers(ddt), numbers(da), numbers(db), numbers(dc), numbers(dskip), numbers(before)});
  return {dx.to(x.scalar_type()), ddt.to(dt.scalar_type()), da, db.to(b.scalar_type()), dc.to(c.scalar_type()), dskip,
          before};
}

// How many threads a loop of 64 rounds is really given: PyTorch's number, if the library was built to use them.
int64_t threads_in_use() {
  std::vector<char> seen(threads(), 0);
  at::parallel_for(0, 64, 1, [&](int64_t, int64_t) { seen[at::get_thread_num()] = 1; });
  return std::count(seen.begin(), seen.end(), 1);
}

}  // namespace
}  // namespace regard

TORCH_LIBRARY(regard, m) {
  m.def("threads_in_use() -> int", regard::threads_in_use);
  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, int[] size, int[] shift, bool grid, float scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor lse, "
      "int[] size, int[] shift, bool grid, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "neighborhood_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, int[] kernel, int[] stride, int[] dilation, "
      "int[] causal, float scale) -> (Tensor, Tensor)");
  m.def(
      "neighborhood_attention_backward(Tensor gradient, Tensor? lse_gradient, Tensor q, Tensor k, Tensor v, "
      "Tensor? bias, Tensor lse, int[] kernel, int[] stride, int[] dilation, int[] causal, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("grouped_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor key_offsets, float scale) "
        "-> (Tensor, Tensor)");
  m.def(
      "grouped_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor key_offsets, "
      "Tensor lse, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("routed_attention(Tensor q, Tensor k, Tensor v, Tensor index, float scale) -> (Tensor, Tensor)");
  m.def(
      "routed_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor index, Tensor lse, "
      "float scale) -> (Tensor, Tensor, Tensor)");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor, Tensor)");
  m.def(
      "decode_attention_backward(Tensor gradient, Tensor? lse_gradient, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, bool causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? state_kv, Tensor? state_k, "
      "bool normalize, float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_backward(Tensor gradient, Tensor? kv_gradient, Tensor? k_gradient, Tensor q, Tensor k, "
      "Tensor v, Tensor? decay, Tensor? state_kv, Tensor? state_k, Tensor out, Tensor totals, bool normalize, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("selective_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? skip, Tensor? state) "
        "-> (Tensor, Tensor)");
  m.def(
      "selective_scan_backward(Tensor gradient, Tensor? after_gradient, Tensor x, Tensor dt, Tensor a, Tensor b, "
      "Tensor c, Tensor? skip, Tensor? state) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(regard, CPU, m) {
  m.impl("window_attention", regard::window_attention);
  m.impl("window_attention_backward", regard::window_attention_backward);
  m.impl("neighborhood_attention", regard::neighborhood_attention);
  m.impl("neighborhood_attention_backward", regard::neighborhood_attention_backward);
  m.impl("grouped_attention", regard::grouped_attention);
  m.impl("grouped_attention_backward", regard::grouped_attention_backward);
  m.impl("routed_attention", regard::routed_attention);
  m.impl("routed_attention_backward", regard::routed_attention_backward);
  m.impl("decode_attention", regard::decode_attention);
  m.impl("decode_attention_backward", regard::decode_attention_backward);
  m.impl("linear_attention", regard::linear_attention);
  m.impl("linear_attention_backward", regard::linear_attention_backward);
  m.impl("selective_scan", regard::selective_scan);
  m.impl("selective_scan_backward", regard::selective_scan_backward);
}
