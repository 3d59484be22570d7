// The plain form of every kernel: double precision, one loop per index, no blocking. Tests compare with
// these.
#pragma once

#include <cstdint>
#include <vector>

#include "libs/kernels/cpu/mla.h"
#include "libs/model/config.h"

namespace minke::kernels::reference {

// a [m, k] x w [n, k]^T -> [m, n]
std::vector<double> MatMul(const std::vector<double>& a, const std::vector<double>& w, int64_t m, int64_t n,
                           int64_t k);
std::vector<double> RmsNorm(const std::vector<double>& x, const std::vector<double>& weight, double eps);
// x [m, hidden], gate and up [inner, hidden], down [hidden, inner] -> [m, hidden]
std::vector<double> SwiGlu(const std::vector<double>& x, const std::vector<double>& gate,
                           const std::vector<double>& up, const std::vector<double>& down, int64_t m,
                           int64_t hidden, int64_t inner);
// One sequence, naive form: q [rows, heads, q_dim] of the last `rows` positions, latent [keys, latent_dim],
// kv_b [heads * (nope + v), kv_lora_rank] -> [rows, heads, v].
std::vector<double> Mla(const MlaShape& shape, const std::vector<double>& q,
                        const std::vector<double>& latent, const std::vector<double>& kv_b, int64_t rows,
                        int64_t keys);

struct Route {
  std::vector<int> experts;  // ascending
  std::vector<double> weights;
};
Route RouteToken(const ModelConfig& config, const std::vector<double>& logits);

}  // namespace minke::kernels::reference
