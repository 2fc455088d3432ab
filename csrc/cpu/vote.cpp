// vote_fwd: the class each position of a feature map votes for.
//
// ATen's own matrix product makes the scores of one tile of positions and classes at a time; an argmax kernel
// takes each tile while it is in cache. The dense scores never exist.
#include <algorithm>
#include <optional>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include "rows.h"

namespace zipfls::cpu {
namespace {

constexpr int64_t kTileBytes = int64_t{1} << 22;  // scores held at once
constexpr int64_t kPackBytes = int64_t{1} << 24;  // features, and weights, converted or packed at once

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

at::Tensor vote_fwd_cpu(const at::Tensor& features, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        int64_t upsample) {
  TORCH_CHECK_VALUE(features.dim() == 3 || features.dim() == 4, "features must be (N, D, H, W) or (N, T, D), got ",
                    features.sizes());
  check_float(features, "features");
  const bool map = features.dim() == 4;
  TORCH_CHECK_VALUE(upsample == 1 || (upsample == 2 && map), "upsample must be 1, or 2 for a map, got ", upsample);
  // (N, H * W, D), a view of any strides
  const at::Tensor positions = map ? features.permute({0, 2, 3, 1}) : features.unsqueeze(1);
  const int64_t N = positions.size(0), H = positions.size(1), W = positions.size(2), D = positions.size(3);
  const int64_t C = weight.dim() == 2 ? weight.size(0) : 0;
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == D, "weight must have shape (C, ", D, "), got ",
                    weight.sizes());
  check_num_classes(C);
  check_type(weight, "weight", features.scalar_type());
  check_same_device(weight, "weight", features);
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == C, "bias must have shape (", C, ",), got ", bias->sizes());
    check_type(*bias, "bias", features.scalar_type());
    check_same_device(*bias, "bias", features);
  }

  const Kernels& k = kernels();
  const auto type = accumulation_type(features.scalar_type());
  const int64_t size = type == at::kDouble ? 8 : 4, sums = type == at::kDouble;
  const auto options = features.options().dtype(type);
  const int64_t S = H * W, rows = N * S;  // positions of an image; in all
  const int64_t P = upsample * upsample * S;
  at::Tensor votes = at::empty({N, P}, features.options().dtype(at::kInt));  // (N, P) int32
  int32_t* const index = votes.mutable_data_ptr<int32_t>();
  std::fill_n(index, N * P, -1);
  if (rows == 0) return votes;
  const at::Tensor b = bias.has_value() ? bias->to(type).contiguous() : at::Tensor();  // (C,) A
  const auto* const biases = bias.has_value() ? static_cast<const char*>(b.const_data_ptr()) : nullptr;

  // Rows without a copy: one stride from position to position through the whole batch.
  const bool direct = features.scalar_type() == type && (D == 1 || positions.stride(3) == 1) &&
                      (W == 1 || true) && positions.is_contiguous();
  const at::Tensor flat = direct ? positions.view({rows, D}) : at::Tensor();

  const int64_t unit = upsample == 2 ? S : 1;  // rows that must stay together
  const int64_t Q = std::max<int64_t>(1, std::min(C, std::max<int64_t>(kTileBytes / size / std::max<int64_t>(unit, 512), 1)));
  int64_t R = std::max<int64_t>(unit, kTileBytes / size / Q);
  if (!direct) R = std::min(R, std::max<int64_t>(1, kPackBytes / size / std::max<int64_t>(1, D)));
  R = std::max<int64_t>(1, R / unit) * unit;
  R = ceil_div(ceil_div(rows, ceil_div(rows, R)), unit) * unit;

  const int64_t up = upsample * upsample;
  at::Tensor scores = at::empty({std::min(R, rows) * Q}, options);      // (R, Q) A
  at::Tensor best = at::empty({std::min(R, rows) * up}, options);       // (R,) A
  at::Tensor lines = at::empty({upsample == 2 ? at::get_num_threads() * W * Q : 0}, options);
  for (int64_t r = 0; r < rows; r += R) {
    const int64_t n = std::min(R, rows - r);
    at::Tensor tile;
    if (direct) {
      tile = flat.narrow(0, r, n);
    } else {
      tile = at::empty({n, D}, options);
      for (int64_t p = r; p < r + n;) {  // image by image
        const int64_t image = p / S, first = p % S, count = std::min(S - first, r + n - p);
        tile.narrow(0, p - r, count).copy_(positions.select(0, image).reshape({S, D}).narrow(0, first, count));
        p += count;
      }
    }
    for (int64_t q = 0; q < C; q += Q) {
      const int64_t m = std::min(Q, C - q);
      at::Tensor out = scores.narrow(0, 0, n * m).view({n, m});
      at::cpu::mm_out(out, tile, weight.narrow(0, q, m).to(type).t());
      const auto* const s = static_cast<const char*>(out.const_data_ptr());
      auto* const bests = static_cast<char*>(best.mutable_data_ptr());
      const char* const tile_bias = biases == nullptr ? nullptr : biases + q * size;
      if (upsample == 1) {
        at::parallel_for(0, n, std::max<int64_t>(1, 65536 / m), [&](int64_t begin, int64_t end) {
          k.argmax[sums](s + begin * m * size, end - begin, m, q, tile_bias, bests + begin * size, index + r + begin);
        });
      } else {
        at::parallel_for(0, n / S, std::max<int64_t>(1, 16384 / (m * S)), [&](int64_t begin, int64_t end) {
          char* const line = static_cast<char*>(lines.mutable_data_ptr()) + at::get_thread_num() * W * Q * size;
          for (int64_t i = begin; i < end; i++)
            k.argmax_upsampled[sums](s + i * S * m * size, H, W, m, q, tile_bias, line, bests + i * P * size,
                                     index + (r / S + i) * P);
        });
      }
    }
  }
  return votes;
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CPU, m) { m.impl("vote_fwd", vote_fwd_cpu); }

}  // namespace zipfls::cpu
