// Arguments of every operator. Plain structures: no CUDA and no torch header.
#pragma once

#include <cstdint>

namespace zipfls::cuda {

constexpr int kWarp = 32;  // threads of a warp

/// Element types of logits and gradient. Arithmetic ("A" in the shapes) uses float, for float64
/// double; an argument of type A is passed as double and rounded on the device.
enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

enum Reduction { kNone, kSum, kMean };

/// (N, P) votes: rows of int32 or int64, each contiguous.
struct Votes {
  const void* data = nullptr;  // null: none were given
  int64_t stride = 0;          // elements from row to row
  int32_t P = 0;
  bool wide = false;  // int64
};

/// What the mean's denominators are computed from, by every block of loss_fwd: see mean_scales.
struct Denominators {
  const int64_t* target;   // (N,) int64
  const void* weight;      // (C,) A, or null
  const int32_t* correct;  // (N,) int32, whether a sample counts in the Zipf part; null: all do
  const double*
      partials;  // (3, num_partials) float64 from loss_totals; null: add up the targets here
  int32_t num_partials;
  int64_t N;
  int32_t C;
  int64_t ignore_index;
};

/// loss_fwd.
struct LossFwd {
  const void* logits;     // (N, C) T
  int64_t logits_stride;  // elements from row to row
  const int64_t* target;  // (N,) int64
  Votes votes;
  const void* log_mass;  // (R,) A by rank; LossGeneral::dense: (N, C) A
  const void* weight;    // (C,) A, or null
  const int32_t*
      correct;  // (N,) int32 from loss_correct, or null: only_correct then looks at the row
  int64_t N;
  int32_t C;
  int64_t ignore_index;
  bool ce, zipf;      // which parts are wanted
  bool only_correct;  // the Zipf part counts only where the target has the largest logit
  double ce_weight, zipf_weight, label_smoothing;
  int32_t reduction;  // Reduction
  bool scaled;        // a float16 mean: the gradient's 1/N is left to backward, as grad_scale
  Denominators denominators;
  void* loss;      // (1,), or (N,) for kNone; A
  void* ce_out;    // as loss
  void* zipf_out;  // as loss
  void* grad;  // (N, C) T, contiguous, rows at the same phase of 16 bytes as logits; may be logits;
               // or null
  void* factors;     // (N, 4) A, see keep_factors, or null: what a gradient over the logits is made
                     // of later; not LossGeneral::dense, probabilities or weighted label smoothing
  void* patches;     // (N, P) T where factors are wanted: the gradient at the class of a vote, NaN
                     // where another vote has it; of votes for the target or for no class: any
  void* grad_scale;  // (1,) A where scaled
  double* sums;      // (2, blocks) float64 scratch; null for kNone
  uint32_t* tile_counter;  // (1,) uint32, 0 before and after; null for kNone
};

/// loss_fwd where the target is probabilities or every class has a log mass: loss_general.cuh.
struct LossGeneral : LossFwd {
  const void* probabilities;  // (N, C) A, rows at the same element of a 16-byte vector as logits';
                              // null: LossFwd::target
  int64_t probabilities_stride;  // elements from row to row
  bool dense;                    // log_mass is (N, C)
};

/// distill_fwd: LossFwd with a teacher's row in the place of the label. What is Zipf's in LossFwd
/// is the distillation's; votes, log_mass, weight, correct and label_smoothing are not read.
struct DistillFwd : LossFwd {
  const void* teacher;  // (N, C) T, or A where wide; rows at the same element of a 16-byte vector
                        // as logits'. LossFwd::target null: its largest class, lowest on ties
  int64_t teacher_stride;  // elements from row to row
  bool wide;
  const int64_t* teacher_index;  // (N,) int64, or null: the teacher is (table_rows, C), its row of
  int64_t table_rows;            // a sample the index's; outside of it the sample becomes NaN
  const void* sample_weight;     // (N,) A, of the terms but the cross-entropy, or null
  int64_t weight_stride;         // elements from row to row; 1 but where more()
  const void* share;             // (N,) A, of the cross-entropy, with the same stride, or null
  double kd_weight, tckd_weight, nckd_weight, soft_target_weight, max_weight, temperature;
  bool divergence;     // form; else "cross_entropy"
  bool probabilities;  // the teacher's rows are these; not divergence

  /// Whether the kernel with all options is wanted.
  bool more() const { return probabilities || share != nullptr || max_weight != 0; }
};

/// loss_totals: partial sums of the denominators, (3, blocks) float64.
struct LossTotals {
  Denominators of;
  double* partials;
};

/// loss_bwd: out = grad * grad_loss * grad_scale.
struct LossBwd {
  const void* grad;       // (N, C) T, contiguous
  void* out;              // (N, C) T, contiguous; may be grad
  const void* grad_loss;  // (1,) A, or (N,) A, any stride
  int64_t grad_loss_stride;
  const void* grad_scale;  // (1,) A, or null
  int64_t N;               // rows of one scale each: for a scalar loss 1, of all elements
  int64_t C;               // elements a row
};

/// loss_factors_bwd: the gradient over the logits, from what loss_fwd kept of them.
struct FactorsBwd {
  void* logits;           // (N, C) T, contiguous
  const int64_t* target;  // (N,) int64
  Votes votes;            // P: 0 where they made no label
  const void* factors;    // (N, 4) A, as the next from LossFwd
  const void* patches;    // (N, P) T
  const void* grad_loss;  // (1,) A, or (N,) A, any stride
  int64_t grad_loss_stride;
  const void* grad_scale;  // (1,) A, or null
  int64_t N;
  int32_t C;
};

/// rank_fwd and label_fwd.
struct LabelFwd {
  const int64_t* target;  // (N,) int64; null for ranks
  Votes votes;
  const void* log_mass;  // (R,) A by rank, or (N, C) A where dense; null for ranks
  bool dense;
  int64_t N;
  int32_t C;
  int64_t ignore_index;
  void* out;  // (N, C): ranks int32, labels A
};

// Votes -------------------------------------------------------------------------------------------

/// Element type of features, weight and bias. Accumulators are float32 throughout.
enum class VoteType {
  kBFloat16,
  kFloat16,
  kTensorFloat32,  // float32 in memory, multiplied with 10 bits of mantissa
};

/// One call. Strides count elements; where a size is 1 its stride is never used.
struct VoteProblem {
  VoteType type = VoteType::kBFloat16;
  const void* features = nullptr;  // (N, H, W, D), any strides; tokens are H = 1, W = T
  int64_t N = 0, H = 0, W = 0, D = 0;
  int64_t stride_n = 0, stride_h = 0, stride_w = 0, stride_d = 0;
  const void* weight = nullptr;  // (C, D), any strides
  int64_t C = 0;
  int64_t weight_stride_c = 0, weight_stride_d = 0;
  const void* bias = nullptr;  // (C,), or null
  int64_t bias_stride = 0;
  int upsample = 1;  // 1, or 2: bilinear, align_corners=False, on the scores, before the bias
  int32_t* votes = nullptr;  // (N, upsample*H * upsample*W), contiguous
};

}  // namespace zipfls::cuda
