#include "libs/kernels/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace minke::kernels::reference {

std::vector<double> MatMul(const std::vector<double>& a, const std::vector<double>& w, int64_t m, int64_t n,
                           int64_t k) {
  std::vector<double> c(m * n, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < k; ++p) c[i * n + j] += a[i * k + p] * w[j * k + p];
    }
  }
  return c;
}

std::vector<double> RmsNorm(const std::vector<double>& x, const std::vector<double>& weight, double eps) {
  double squares = 0;
  for (const double v : x) squares += v * v;
  const double factor = 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
  std::vector<double> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * factor * weight[i];
  return out;
}

std::vector<double> SwiGlu(const std::vector<double>& x, const std::vector<double>& gate,
                           const std::vector<double>& up, const std::vector<double>& down, int64_t m,
                           int64_t hidden, int64_t inner) {
  std::vector<double> g = MatMul(x, gate, m, inner, hidden);
  const std::vector<double> u = MatMul(x, up, m, inner, hidden);
  for (size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
  return MatMul(g, down, m, hidden, inner);
}

std::vector<double> Mla(const MlaShape& s, const std::vector<double>& q, const std::vector<double>& latent,
                        const std::vector<double>& kv_b, int64_t rows, int64_t keys) {
  std::vector<double> out(rows * s.heads * s.v_dim, 0.0);
  const int64_t head_rows = s.nope_dim + s.v_dim;
  const auto project = [&](int64_t key, int64_t kv_row) {
    double sum = 0;
    for (int64_t r = 0; r < s.kv_lora_rank; ++r)
      sum += kv_b[kv_row * s.kv_lora_rank + r] * latent[key * s.latent_dim() + r];
    return sum;
  };
  for (int64_t h = 0; h < s.heads; ++h) {
    std::vector<double> k_nope(keys * s.nope_dim), v(keys * s.v_dim);
    for (int64_t key = 0; key < keys; ++key) {
      for (int64_t i = 0; i < s.nope_dim; ++i) k_nope[key * s.nope_dim + i] = project(key, h * head_rows + i);
      for (int64_t i = 0; i < s.v_dim; ++i)
        v[key * s.v_dim + i] = project(key, h * head_rows + s.nope_dim + i);
    }
    for (int64_t t = 0; t < rows; ++t) {
      const double* query = &q[(t * s.heads + h) * s.q_dim()];
      const int64_t visible = keys - rows + t + 1;
      std::vector<double> p(visible);
      double sum = 0, maximum = -INFINITY;
      for (int64_t key = 0; key < visible; ++key) {
        double score = 0;
        for (int64_t i = 0; i < s.nope_dim; ++i) score += query[i] * k_nope[key * s.nope_dim + i];
        for (int64_t i = 0; i < s.rope_dim; ++i)
          score += query[s.nope_dim + i] * latent[key * s.latent_dim() + s.kv_lora_rank + i];
        p[key] = score * s.softmax_scale;
        maximum = std::max(maximum, p[key]);
      }
      for (double& value : p) sum += value = std::exp(value - maximum);
      for (int64_t key = 0; key < visible; ++key) {
        for (int64_t i = 0; i < s.v_dim; ++i)
          out[(t * s.heads + h) * s.v_dim + i] += p[key] / sum * v[key * s.v_dim + i];
      }
    }
  }
  return out;
}

Route RouteToken(const ModelConfig& config, const std::vector<double>& logits) {
  const int n = static_cast<int>(logits.size());
  const double maximum = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p(n);
  double sum = 0;
  for (int e = 0; e < n; ++e) sum += p[e] = std::exp(logits[e] - maximum);
  for (double& value : p) value /= sum;
  std::vector<int> candidates(n);
  std::iota(candidates.begin(), candidates.end(), 0);
  const auto better = [&](int a, int b) { return logits[a] > logits[b]; };
  if (config.topk_method == TopkMethod::kGroupLimitedGreedy) {
    const int size = n / config.n_group;
    std::vector<int> groups(config.n_group);
    std::iota(groups.begin(), groups.end(), 0);
    const auto best_of = [&](int g) {
      return *std::max_element(logits.begin() + g * size, logits.begin() + (g + 1) * size);
    };
    std::stable_sort(groups.begin(), groups.end(), [&](int a, int b) { return best_of(a) > best_of(b); });
    groups.resize(config.topk_group);
    std::erase_if(candidates,
                  [&](int e) { return std::find(groups.begin(), groups.end(), e / size) == groups.end(); });
  }
  std::stable_sort(candidates.begin(), candidates.end(), better);
  candidates.resize(config.num_experts_per_tok);
  std::sort(candidates.begin(), candidates.end());
  Route route{candidates, {}};
  double total = 0;
  for (const int e : candidates) total += p[e];
  for (const int e : candidates) {
    route.weights.push_back(config.norm_topk_prob && candidates.size() > 1
                                ? p[e] / (total + 1e-20)
                                : p[e] * config.routed_scaling_factor);
  }
  return route;
}

}  // namespace minke::kernels::reference
