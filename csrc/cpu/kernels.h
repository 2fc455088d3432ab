// What a kernel is called with, and the table of kernels of one instruction set. No torch here.
#pragma once

#include <cstdint>

namespace zipfls::cpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

/// Element types, in the order of the tables below. Arithmetic ("A" in the shapes) runs in float,
/// for float64 in double.
enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

/// (N, P) votes: rows of int32 or int64, each contiguous.
struct Votes {
  const void* data = nullptr;  // null: none were given
  int64_t stride = 0;          // elements from row to row
  int64_t P = 0;
  bool wide = false;  // int64
};

/// Where a class's log mass comes from.
enum class Mass {
  kByVotes,   // a table by rank, ranks by votes
  kByLogits,  // a table by rank, ranks by logits
  kPerClass,  // (N, C), given
};

/// Buffers of one thread, reused from row to row; sizes: scratch.h.
struct Scratch {
  int32_t* counts;   // (C,) int32, votes per class; all zero between rows
  int32_t* voted;    // (min(P, C) + 1,) int32, the classes with a vote
  int32_t* votes;    // (min(P, C) + W,) int32, their numbers of votes
  int32_t* members;  // (P + 2,) int32, groups of classes with the same number of votes: how many
                     // they are
  int32_t* group_count;  // (P + 2,) int32, their number of votes
  int32_t* group_rank;   // (P + 2,) int32, their rank
  void* mass;            // (P + 1,) A, mass by rank
  void* label;           // (P + 2,) A, label by number of votes
  void* excess;          // (min(P, C) + 1 + W,) A, at the voted classes: label
  void* distance;        // (min(P, C) + 1 + W,) A, logit
  void* patch;           // (min(P, C) + 1 + W,) A, gradient at the voted classes
  void* row[5];          // (C + W,) A each: exponentials; dense label; dense log mass; padded class
                 // weights; one more for soft targets, which use them all (soft_loss_kernel.h)
  void* padded[2];  // (W,) of the logits' type: a padded row where C < W, and its gradient;
                    // soft targets: class weights and target, in A
  void* sort[2];    // (C,) of 16 bytes each, for ranking by logits
};

/// loss_fwd: one call serves rows [begin, end).
struct LossFwd {
  int64_t C;
  const void* logits;     // (N, C) T
  int64_t logits_stride;  // elements from row to row
  const void* target;     // (N,) int64 in [0, C) or ignore_index; or (N, C) A, probabilities
  int64_t target_stride;  // elements from row to row
  Votes votes;
  const void* log_mass;    // (R,) or (N, C) A
  const void* weight;      // (C,) A, or null
  double weight_sum;       // sum of weight, or C; not for probabilities
  const uint8_t* correct;  // (N,) bool, or null: the kernel for classes then compares by itself
  int64_t ignore_index;
  Mass mass;
  bool ce, zipf;           // which parts are wanted
  bool only_correct;       // the Zipf part counts only where the target has the largest logit
  double label_smoothing;  // e
  double ce_factor;        // what the gradient of a row's CE is multiplied with
  double zipf_factor;      // and that of its Zipf part
  void* grad;              // (N, C) T, contiguous; null: not wanted
  double* ce_rows;         // (N,) float64, unscaled
  double* zipf_rows;       // (N,) float64, unscaled
};

/// distill_fwd: one call serves rows [begin, end).
struct DistillFwd {
  int64_t C;
  const void* logits;            // (N, C) T
  int64_t logits_stride;         // elements from row to row
  const void* teacher;           // (N, C) T or A; (R, C) by teacher_index
  int64_t teacher_stride;        // elements from row to row
  const int64_t* teacher_index;  // (N,) in [0, R) but for ignored samples; null: row i of sample i
  const int64_t* target;  // (N,) in [0, C) or ignore_index; null: the teacher's largest class
  int64_t ignore_index;
  const void* sample_weight;  // (N,) A, of the terms but the cross-entropy, or null
  int64_t weight_stride;      // elements from row to row
  const void* share;          // (N,) A, of the cross-entropy, with the same stride, or null
  double ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight, max_weight;
  double temperature;
  bool cross_entropy;  // without the teacher's entropies
  bool probabilities;  // the teacher's rows are these, and cross_entropy is set
  double factor;       // what the gradient of a row is multiplied with
  void* grad;          // (N, C) T, contiguous; null: not wanted
  double* ce_rows;     // (N,) float64, unweighted
  double* rest_rows;   // (N,) float64, the loss but for ce_weight * CE

  /// Whether the softmax at T = 1 is wanted, and whether one of the terms at T is.
  bool hard() const { return ce_weight != 0 || soft_target_weight != 0 || max_weight != 0; }
  bool distils() const { return kd_weight != 0 || tckd_weight != 0 || nckd_weight != 0; }
  /// Whether the kernel with all options is wanted.
  bool more() const { return probabilities || share != nullptr || max_weight != 0; }
};

/// One table for each instruction set. A function that returns bool tells whether all votes were
/// below C.
struct Kernels {
  const char* name;
  /// loss and gradient of rows [begin, end), for a target of classes and of probabilities.
  bool (*loss_fwd[kDtypes])(const LossFwd&, const Scratch&, int64_t begin, int64_t end);
  bool (*soft_loss_fwd[kDtypes])(const LossFwd&, const Scratch&, int64_t begin, int64_t end);
  /// Distillation; teacher in the logits' type, and in the arithmetic's.
  void (*distill_fwd[kDtypes])(const DistillFwd&, const Scratch&, int64_t begin, int64_t end);
  void (*distill_fwd_wide[kDtypes])(const DistillFwd&, const Scratch&, int64_t begin, int64_t end);
  /// Whether the target has the largest logit of its row (lowest index on ties).
  bool (*is_correct[kDtypes])(const void* row, int64_t C, int64_t y);
  /// out = in * scale, n elements, the product in A; in == out is allowed.
  void (*scale[kDtypes])(const void* in, void* out, int64_t n, double scale);
  /// Ranks (C,) int32 of one row of votes.
  bool (*rank_row)(const Votes&, int64_t i, int64_t C, const Scratch&, int32_t* rank);
  /// Label (C,) A of one row, from a table by rank or from the row's own log masses (C,): float,
  /// double.
  bool (*label_row[2])(const Votes&, int64_t i, int64_t C, int64_t y, const void* log_mass,
                       const Scratch&, void* label);
  bool (*label_row_given[2])(const Votes&, int64_t i, int64_t C, int64_t y, const void* log_mass,
                             const Scratch&, void* label);
  /// Positions as rows (count, D) of their own type, or widened to the type of sums. See
  /// vote_kernel.h for this and the rest.
  void (*pack[kDtypes])(const void* from, int64_t along_p, int64_t along_d, int64_t count,
                        int64_t D, void* to);
  void (*pack_wide[kDtypes])(const void* from, int64_t along_p, int64_t along_d, int64_t count,
                             int64_t D, void* to);
  /// argmax of rows of scores, combined with (best, index): float, double.
  void (*argmax[2])(const void* scores, int64_t rows, int64_t Q, int64_t first_class,
                    const void* bias, void* best, int32_t* index);
  /// The same over one image's scores (H * W, Q), bilinearly doubled: (2H * 2W) pairs.
  void (*argmax_upsampled[2])(const void* scores, int64_t H, int64_t W, int64_t Q,
                              int64_t first_class, const void* bias, void* line, void* best,
                              int32_t* index);
  /// Votes from products rounded to bfloat16.
  void (*argmax_rounded)(const void* scores, int64_t rows, int64_t C, const void* features,
                         int64_t stride, const void* weight, int64_t D, const float* bias,
                         int32_t* index);
};

extern const Kernels kBaseline;
extern const Kernels kAvx2;
extern const Kernels kAvx512;

}  // namespace zipfls::cpu
