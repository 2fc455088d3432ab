// vote_fwd: the class each position of a feature map votes for.
//
// ATen's own matrix product makes the scores of one tile of positions and classes at a time; an
// argmax kernel takes each tile while it is in cache. The dense scores never exist: extra memory is
// a tile of scores, and, where features must be packed or converted first, a tile of those and of
// the weights: 48 MiB at most, unless upsampling has to keep the scores of a larger image together.
#include <algorithm>
#include <optional>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include "rows.h"

namespace zipfls::cpu {
namespace {

/// Bytes of a tile of scores. The product packs the weights anew for every tile, which fewer and
/// larger tiles save; the argmax wants a tile that is still in the second-level caches. The deeper
/// the product, the less the argmax weighs.
int64_t score_bytes(int64_t D) { return std::clamp(D << 15, int64_t{1} << 21, int64_t{1} << 24); }

constexpr int64_t kPackBytes = int64_t{1} << 24;  // of packed features, and of converted weights
constexpr int64_t kSpare = 64;                    // bytes behind what kernels read by whole vectors

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// x (elements,) of a type, with room to spare behind.
at::Tensor scratch(int64_t elements, const at::TensorOptions& options) {
  return at::empty({elements + kSpare / static_cast<int64_t>(options.dtype().itemsize())}, options);
}

/// Features as rows of positions, whatever their strides.
class Positions {
 public:
  /// features (N, D, H, W) or (N, T, D); rows come in `type`, that of the features or wider.
  Positions(const at::Tensor& features, at::ScalarType type)
      : x_(features.dim() == 4 ? features.permute({0, 2, 3, 1}) : features.unsqueeze(1)),
        type_(type) {
    const auto stride = [&](int axis) { return x_.stride(axis); };
    row_ = W() > 1 ? stride(2) : H() > 1 ? stride(1) : N() > 1 ? stride(0) : D();
    const bool regular =
        (H() == 1 || stride(1) == W() * row_) && (N() == 1 || stride(0) == S() * row_);
    direct_ = regular && type == x_.scalar_type() && (D() <= 1 || stride(3) == 1) &&
              row_ >= std::max<int64_t>(1, D());
  }

  int64_t N() const { return x_.size(0); }
  int64_t H() const { return x_.size(1); }
  int64_t W() const { return x_.size(2); }
  int64_t D() const { return x_.size(3); }
  int64_t S() const { return H() * W(); }
  /// Whether rows can be had without a copy.
  bool direct() const { return direct_; }

  /// Rows [first, first + n) as (n, D): a view, or packed into `buffer`.
  at::Tensor rows(int64_t first, int64_t n, const at::Tensor& buffer) const {
    if (direct_) return at::as_strided(x_, {n, D()}, {row_, 1}, x_.storage_offset() + first * row_);
    const at::Tensor out = buffer.narrow(0, 0, n * D()).view({n, D()});
    const Kernels& k = kernels();
    const auto pack = (type_ == x_.scalar_type() ? k.pack : k.pack_wide)[dtype_of(x_)];
    const auto* const from = static_cast<const char*>(x_.const_data_ptr());
    auto* const to = static_cast<char*>(out.mutable_data_ptr());
    const int64_t from_size = x_.element_size(), to_size = out.element_size();
    // Positions with one stride between them: whole images where lines follow each other, else
    // lines.
    const int64_t run = H() == 1 || x_.stride(1) == W() * x_.stride(2) ? S() : W();
    const int64_t last = first + n, least = ceil_div(32768, run * D() + 1);
    at::parallel_for(first / run, ceil_div(last, run), least, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t p = std::max(first, i * run), count = std::min(last, (i + 1) * run) - p;
        const int64_t image = p / S(), h = p % S() / W(), w = p % W();
        const int64_t offset = image * x_.stride(0) + h * x_.stride(1) + w * x_.stride(2);
        pack(from + offset * from_size, W() > 1 ? x_.stride(2) : x_.stride(1), x_.stride(3), count,
             D(), to + (p - first) * D() * to_size);
      }
    });
    return out;
  }

 private:
  at::Tensor x_;  // (N, H, W, D), a view of any strides; tokens have H = 1
  at::ScalarType type_;
  int64_t row_;  // elements from position to position
  bool direct_;
};

/// Rows of a tile: at most `limit`, a multiple of `unit`, and evenly many in each tile.
int64_t rows_of_tile(int64_t rows, int64_t limit, int64_t unit) {
  limit = std::max<int64_t>(1, limit / unit) * unit;
  return ceil_div(ceil_div(rows, ceil_div(rows, limit)), unit) * unit;
}

/// Votes by scores in the type of sums.
void vote_by_sums(const at::Tensor& features, const at::Tensor& weight, const at::Tensor& bias,
                  int64_t upsample, int32_t* index) {
  const auto type = accumulation_type(features.scalar_type());
  const Positions positions(features, type);
  const Kernels& k = kernels();
  const int64_t N = positions.N(), H = positions.H(), W = positions.W(), D = positions.D(),
                S = positions.S();
  const int64_t C = weight.size(0), rows = N * S, up = upsample * upsample, P = up * S;
  const int64_t size = type == at::kDouble ? 8 : 4, sums = type == at::kDouble;
  const int64_t tile_bytes = score_bytes(D);
  const auto options = features.options().dtype(type);

  // Upsampling needs an image's scores together. Classes are split only where a few rows would not
  // fit.
  const int64_t together = upsample == 2 ? S : 1;
  const bool convert = weight.scalar_type() != type, keep = convert && C * D * size <= kPackBytes;
  int64_t Q = tile_bytes / size / std::max<int64_t>(together, 256);
  if (convert && !keep) Q = std::min(Q, kPackBytes / size / std::max<int64_t>(1, D));
  Q = std::clamp<int64_t>(Q, 1, C);
  int64_t limit = tile_bytes / size / Q;
  if (!positions.direct()) limit = std::min(limit, kPackBytes / size / std::max<int64_t>(1, D));
  const int64_t R = rows_of_tile(rows, limit, upsample == 2 || S <= limit ? S : 1);

  const at::Tensor scores = scratch(R * Q, options);                           // (R, Q) A
  const at::Tensor best = at::empty({R * up}, options);                        // (R * up,) A
  const at::Tensor packed = scratch(positions.direct() ? 0 : R * D, options);  // (R, D) A
  const at::Tensor lines =
      scratch(upsample == 2 ? at::get_num_threads() * (W * Q + kSpare) : 0, options);
  const at::Tensor wide = keep ? weight.to(type) : weight;  // (C, D)
  const auto* const biases =
      bias.defined() ? static_cast<const char*>(bias.const_data_ptr()) : nullptr;

  for (int64_t r = 0; r < rows; r += R) {
    const int64_t n = std::min(R, rows - r);
    const at::Tensor tile = positions.rows(r, n, packed);  // (n, D) A
    for (int64_t q = 0; q < C; q += Q) {
      const int64_t m = std::min(Q, C - q);
      at::Tensor out = scores.narrow(0, 0, n * m).view({n, m});
      const at::Tensor part = Q == C ? wide : wide.narrow(0, q, m);
      at::cpu::mm_out(out, tile, (convert && !keep ? part.to(type) : part).t());
      const auto* const s = static_cast<const char*>(out.const_data_ptr());
      auto* const bests = static_cast<char*>(best.mutable_data_ptr());
      const char* const tile_bias = biases == nullptr ? nullptr : biases + q * size;
      if (upsample == 1) {
        at::parallel_for(0, n, ceil_div(32768, m), [&](int64_t begin, int64_t end) {
          k.argmax[sums](s + begin * m * size, end - begin, m, q, tile_bias, bests + begin * size,
                         index + r + begin);
        });
      } else {
        at::parallel_for(0, n / S, ceil_div(8192, m * S), [&](int64_t begin, int64_t end) {
          char* const line = static_cast<char*>(lines.mutable_data_ptr()) +
                             at::get_thread_num() * (W * Q + kSpare) * size;
          for (int64_t i = begin; i < end; i++)
            k.argmax_upsampled[sums](s + i * S * m * size, H, W, m, q, tile_bias, line,
                                     bests + i * P * size, index + (r / S + i) * P);
        });
      }
    }
  }
}

/// Votes by a bfloat16 product at the processor's speed and float32 where its rounding leaves a
/// doubt.
void vote_by_rounded(const at::Tensor& features, const at::Tensor& weight, const at::Tensor& bias,
                     int64_t R, int32_t* index) {
  const Positions positions(features, at::kBFloat16);
  const int64_t D = positions.D(), C = weight.size(0), rows = positions.N() * positions.S();
  const at::Tensor scores = scratch(R * C, features.options());  // (R, C) bfloat16
  const at::Tensor packed =
      scratch(positions.direct() ? 0 : R * D, features.options());  // (R, D) bfloat16
  const at::Tensor columns = weight.t();
  const auto* const w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const float* const b = bias.const_data_ptr<float>();
  const auto argmax = kernels().argmax_rounded;
  for (int64_t r = 0; r < rows; r += R) {
    const int64_t n = std::min(R, rows - r);
    const at::Tensor tile = positions.rows(r, n, packed);  // (n, D) bfloat16
    at::Tensor out = scores.narrow(0, 0, n * C).view({n, C});
    at::cpu::mm_out(out, tile, columns);
    const auto* const x = static_cast<const uint16_t*>(tile.const_data_ptr());
    const auto* const s = static_cast<const uint16_t*>(out.const_data_ptr());
    const int64_t stride = tile.stride(0);
    at::parallel_for(0, n, ceil_div(32768, C), [&](int64_t begin, int64_t end) {
      argmax(s + begin * C, end - begin, C, x + begin * stride, stride, w, D, b, index + r + begin);
    });
  }
}

/// Bias (C,) in the type of sums with room to spare behind; undefined, or zeros if asked for, where
/// there is none.
at::Tensor padded_bias(const std::optional<at::Tensor>& bias, int64_t C,
                       const at::TensorOptions& options, bool zeros) {
  if (!bias.has_value() && !zeros) return {};
  at::Tensor out = scratch(C, options).zero_();
  if (bias.has_value()) out.narrow(0, 0, C).copy_(*bias);
  return out;
}

/// features (N, D, H, W) or (N, T, D), weight (C, D), bias (C,) or none -> votes (N, P) int32.
at::Tensor vote_fwd_cpu(const at::Tensor& features, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, int64_t upsample) {
  TORCH_CHECK_VALUE(features.dim() == 3 || features.dim() == 4,
                    "features must be (N, D, H, W) or (N, T, D), got ", features.sizes());
  check_float(features, "features");
  const bool map = features.dim() == 4;
  TORCH_CHECK_VALUE(upsample == 1 || (upsample == 2 && map),
                    "upsample must be 1, or 2 for a map, got ", upsample);
  const int64_t N = features.size(0), D = features.size(map ? 1 : 2);
  const int64_t S = map ? features.size(2) * features.size(3) : features.size(1),
                P = upsample * upsample * S;
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == D, "weight must have shape (C, ", D,
                    "), got ", weight.sizes());
  const int64_t C = weight.size(0);
  check_num_classes(C);
  check_type(weight, "weight", features.scalar_type());
  check_same_device(weight, "weight", features);
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == C, "bias must have shape (", C,
                      ",), got ", bias->sizes());
    check_type(*bias, "bias", features.scalar_type());
    check_same_device(*bias, "bias", features);
  }

  at::Tensor votes = at::empty({N, P}, features.options().dtype(at::kInt));  // (N, P) int32
  int32_t* const index = votes.mutable_data_ptr<int32_t>();
  if (votes.numel() == 0) return votes;
  const auto sums = features.options().dtype(accumulation_type(features.scalar_type()));

  // All classes of some rows must fit in a tile, and the product must be large enough for oneDNN to
  // take it: small ones go to loops that do not promise sums in float32.
  const int64_t rows = N * S,
                limit = std::min(score_bytes(D) / 2 / C, kPackBytes / 2 / std::max<int64_t>(1, D));
  const bool rounded = features.scalar_type() == at::kBFloat16 && upsample == 1 &&
                       multiplies_bfloat16() && at::globalContext().userEnabledMkldnn() &&
                       limit >= 32 && rows >= 64 && C >= 64 && D >= 64;
  if (rounded) {
    vote_by_rounded(features, weight.contiguous(), padded_bias(bias, C, sums, true),
                    rows_of_tile(rows, limit, S <= limit ? S : 1), index);
  } else {
    std::fill_n(index, votes.numel(), -1);
    vote_by_sums(features, weight, padded_bias(bias, C, sums, false), upsample, index);
  }
  return votes;
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CPU, m) { m.impl("vote_fwd", vote_fwd_cpu); }

}  // namespace zipfls::cpu
