// rank_fwd and label_fwd: stages 2 and 3 by themselves, for inspection.
#include <atomic>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace zipfls::cpu {

void raise_outside(const at::Tensor* target, const at::Tensor* votes, int64_t C,
                   const int64_t* ignore_index) {
  const int64_t N = target != nullptr ? target->size(0) : votes->size(0);
  const at::Tensor y = target == nullptr ? at::Tensor() : target->contiguous();
  const at::Tensor v = votes == nullptr ? at::Tensor() : votes->to(at::kLong).contiguous();
  for (int64_t i = 0; i < N; i++) {
    if (target != nullptr) {
      const int64_t class_ = y.const_data_ptr<int64_t>()[i];
      if (ignore_index != nullptr && class_ == *ignore_index) continue;
      TORCH_CHECK_INDEX(class_ >= 0 && class_ < C, "target[", i, "] = ", class_, " is outside [0, ",
                        C, ") and is not ignore_index");
    }
    if (votes == nullptr) continue;
    const int64_t P = v.size(1);
    for (int64_t k = 0; k < P; k++) {
      const int64_t class_ = v.const_data_ptr<int64_t>()[i * P + k];
      TORCH_CHECK_INDEX(class_ < C, "votes[", i, ", ", k, "] = ", class_, " is outside [0, ", C,
                        "); negative means no vote");
    }
  }
}

namespace {

/// votes (N, P) -> ranks (N, C) int32. Reads 4 or 8 bytes a vote, writes 4 bytes a class.
at::Tensor rank_fwd_cpu(const at::Tensor& votes, int64_t C) {
  check_num_classes(C);
  TORCH_CHECK_VALUE(votes.dim() == 2, "votes must have shape (N, P), got ", votes.sizes());
  const int64_t N = votes.size(0), P = votes.size(1);
  check_votes(votes, N);
  const Kernels& k = kernels();
  const at::Tensor v = with_contiguous_rows(votes);                      // (N, P)
  at::Tensor rank = at::empty({N, C}, votes.options().dtype(at::kInt));  // (N, C) int32
  int32_t* const out = rank.mutable_data_ptr<int32_t>();
  std::atomic<bool> inside{true};
  at::parallel_for(0, N, grain(C, P), [&](int64_t begin, int64_t end) {
    const Scratch scratch = thread_scratch().get(C, P, sizeof(float), false);
    bool all = true;
    for (int64_t i = begin; i < end; i++)
      all &= k.rank_row(votes_of(v), i, C, scratch, out + i * C);
    if (!all) inside = false;
  });
  if (!inside) raise_outside(nullptr, &votes, C, nullptr);
  return rank;
}

/// target (N,), votes (N, P), log_mass (R,) or (N, C) -> label (N, C) in the type of log_mass, 0
/// where ignored.
at::Tensor label_fwd_cpu(const at::Tensor& target, const at::Tensor& votes,
                         const at::Tensor& log_mass, int64_t C, int64_t ignore_index) {
  check_num_classes(C);
  TORCH_CHECK_VALUE(target.dim() == 1 && votes.dim() == 2,
                    "target and votes must have shapes (N,) and (N, P), got ", target.sizes(),
                    " and ", votes.sizes());
  const int64_t N = target.size(0), P = votes.size(1);
  check_target(target, N);
  check_votes(votes, N);
  check_same_device(votes, "votes", target);
  check_same_device(log_mass, "log_mass", target);
  check_log_mass(log_mass, N, C, P);
  const auto type = log_mass.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble,
                   "log_mass must be float32 or float64, got ", type);
  const Kernels& k = kernels();
  const at::Tensor y = target.contiguous(), mass = log_mass.contiguous(),
                   v = with_contiguous_rows(votes);
  at::Tensor label = at::empty({N, C}, log_mass.options());  // (N, C) A
  const bool given = log_mass.dim() == 2;
  const int64_t size = log_mass.element_size(), row = C * size;
  const int64_t* const targets = y.const_data_ptr<int64_t>();
  const auto* const masses = static_cast<const char*>(mass.const_data_ptr());
  auto* const out = static_cast<char*>(label.mutable_data_ptr());
  const auto label_row = (given ? k.label_row_given : k.label_row)[type == at::kDouble];
  std::atomic<bool> inside{true};
  at::parallel_for(0, N, grain(C, P), [&](int64_t begin, int64_t end) {
    const Scratch scratch = thread_scratch().get(C, P, size, false);
    bool all = true;
    for (int64_t i = begin; i < end; i++) {
      if (targets[i] == ignore_index) {
        std::fill_n(out + i * row, row, 0);
      } else if (targets[i] < 0 || targets[i] >= C) {
        all = false;
      } else {
        all &= label_row(votes_of(v), i, C, targets[i], masses + (given ? i * row : 0), scratch,
                         out + i * row);
      }
    }
    if (!all) inside = false;
  });
  if (!inside) raise_outside(&target, &votes, C, &ignore_index);
  return label;
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CPU, m) {
  m.impl("rank_fwd", rank_fwd_cpu);
  m.impl("label_fwd", label_fwd_cpu);
}

}  // namespace zipfls::cpu
