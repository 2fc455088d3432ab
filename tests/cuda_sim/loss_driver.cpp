// Runs cases that tests/test_cuda_logic.py wrote to a file through the launchers of the loss and
// the label, on the CPU.
//
//     loss_driver CASES RESULTS
//
// A case is the int64 of Header (in order), the float64 of Numbers and the arrays that its operator
// reads; a result is the number of bytes of text (faults; empty: none), the text, and the arrays
// that the operator writes.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

// The launchers and their kernels, unchanged.
#include "../../csrc/cuda/label.cu"
#include "../../csrc/cuda/loss.cu"
#include "../../csrc/cuda/loss_distill.cu"
#include "../../csrc/cuda/loss_general.cu"

#include "faults.cuh"

using namespace zipfls::cuda;

namespace {

enum Operator { kLoss, kBackward, kRank, kLabel, kFault, kSoftLoss, kDistill };

struct Header {
  int64_t op, dtype, N, C, P, wide, has_votes, dense, has_weight, ce, zipf, only_correct,
      ignore_index, reduction, with_grad, scaled, phase,
      row_gap;  // phase: bytes past a 16-byte boundary; row_gap: elements between rows
  int64_t kernel, threads, cluster;  // kernel: LossPlan::Kernel, or -1: as the launcher plans
  int64_t blocks, totals, multiprocessors,
      clusters;  // blocks: 0: as planned; totals: blocks of loss_totals
  int64_t order, fill, seed, late;
  int64_t R, grad_loss_stride, in_place, repeats;  // in_place: 1, or kKept
};
constexpr int64_t kKept = 2;  // the gradient comes from factors, times a gradient of each loss
struct Numbers {
  double ce_weight, zipf_weight, label_smoothing;
};

/// What follows for a distillation.
struct DistillHeader {
  int64_t wide, has_target, has_sample_weight, divergence, has_index, table_rows;
  int64_t columns, probabilities;  // columns: 1 or 2, of sample_weight
  double kd_weight, tckd_weight, nckd_weight, soft_target_weight, max_weight, temperature;
};

FILE* in;
FILE* out;

/// Memory of a given phase to 16 bytes, ending where its allocation ends: an overrun is
/// AddressSanitizer's.
struct Array {
  std::unique_ptr<unsigned char[]> memory;
  size_t bytes, phase;
  explicit Array(size_t bytes, size_t phase = 0)
      : memory(new unsigned char[bytes + phase + (bytes + phase == 0)]),
        bytes(bytes),
        phase(phase) {
    std::memset(memory.get(), 0xff, bytes + phase);  // NaN, -1: what is not written shows
  }
  unsigned char* data() { return memory.get() + phase; }
};

std::vector<std::unique_ptr<Array>> arrays;

unsigned char* read_array(size_t bytes, const char* name, size_t phase = 0) {
  arrays.push_back(std::make_unique<Array>(bytes, phase));
  if (std::fread(arrays.back()->data(), 1, bytes, in) != bytes) std::abort();
  sim::watch(arrays.back()->data(), bytes, true, name);
  return arrays.back()->data();
}

unsigned char* new_array(size_t bytes, const char* name, size_t phase = 0) {
  arrays.push_back(std::make_unique<Array>(bytes, phase));
  sim::watch(arrays.back()->data(), bytes, false, name);
  return arrays.back()->data();
}

void write_result(const std::vector<std::pair<const void*, size_t>>& results) {
  const std::string text = sim::faults();
  const int64_t size = static_cast<int64_t>(text.size());
  std::fwrite(&size, 8, 1, out);
  std::fwrite(text.data(), 1, text.size(), out);
  for (const auto& [data, bytes] : results)
    if (bytes != 0) std::fwrite(data, 1, bytes, out);
}

/// Launches of kernels whose grid no caller chooses: fewer blocks than rows.
template <class F>
void with_blocks(uint32_t blocks, F launch) {
  sim::most_blocks = blocks;
  if (launch() != cudaSuccess) std::abort();
  sim::most_blocks = 0;
}

Votes read_votes(const Header& h) {
  Votes votes;
  if (h.has_votes == 0) return votes;
  votes.P = static_cast<int32_t>(h.P);
  votes.wide = h.wide != 0;
  votes.stride = h.P;
  votes.data = read_array(h.N * h.P * (h.wide != 0 ? 8 : 4), "votes");
  return votes;
}

size_t results_of(const Header& h) { return h.reduction == kNone ? h.N : 1; }

/// Elements of N rows of C, with a gap after each but the last.
size_t elements(const Header& h) { return h.N > 0 ? (h.N - 1) * (h.C + h.row_gap) + h.C : 0; }

/// What every loss has: its logits from the file, options, and memory for its results.
template <class T>
void read_common(const Header& h, const Numbers& x, LossFwd& a) {
  using A = Arithmetic<T>;
  unsigned char* const logits = read_array(elements(h) * sizeof(T), "logits", h.phase);
  a.logits = logits;
  a.logits_stride = h.C + h.row_gap;
  a.N = h.N;
  a.C = static_cast<int32_t>(h.C);
  a.ignore_index = h.ignore_index;
  a.ce = h.ce != 0;
  a.zipf = h.zipf != 0;
  a.ce_weight = x.ce_weight;
  a.zipf_weight = x.zipf_weight;
  a.reduction = static_cast<int32_t>(h.reduction);
  a.scaled = h.scaled != 0;
  const size_t results = results_of(h);
  a.loss = new_array(results * sizeof(A), "loss");
  a.ce_out = new_array(results * sizeof(A), "ce");
  a.zipf_out = new_array(results * sizeof(A), "zipf");
  if (h.with_grad != 0 && h.in_place != kKept)
    a.grad = h.in_place != 0 ? logits : new_array(h.N * h.C * sizeof(T), "grad", h.phase);
  a.grad_scale = new_array(sizeof(A), "grad_scale");
  arrays.push_back(std::make_unique<Array>(4));
  a.tile_counter = reinterpret_cast<uint32_t*>(arrays.back()->data());
  *a.tile_counter = 0;
  sim::watch(a.tile_counter, 4, true, "tile_counter");
}

/// The phase of a row of A beside logits of type T, at the same element of a 16-byte vector.
template <class T>
size_t phase_of_wide(const Header& h) {
  return h.phase / sizeof(T) * sizeof(Arithmetic<T>) % 16;
}

/// The arguments of loss_fwd.
template <class T>
LossGeneral read_loss(const Header& h, const Numbers& x) {
  using A = Arithmetic<T>;
  LossGeneral a = {};
  read_common<T>(h, x, a);
  a.probabilities_stride = a.logits_stride;
  if (h.op == kSoftLoss) {
    a.probabilities = read_array(elements(h) * sizeof(A), "target", phase_of_wide<T>(h));
  } else {
    a.target = reinterpret_cast<int64_t*>(read_array(h.N * 8, "target"));
  }
  a.votes = read_votes(h);
  a.dense = h.dense != 0;
  a.log_mass = read_array((a.dense ? h.N * h.C : h.R) * sizeof(A), "log_mass");
  if (h.has_weight != 0) a.weight = read_array(h.C * sizeof(A), "weight");
  a.only_correct = h.only_correct != 0;
  a.label_smoothing = x.label_smoothing;
  return a;
}

/// The arguments of distill_fwd.
template <class T>
DistillFwd read_distill(const Header& h, const Numbers& x) {
  using A = Arithmetic<T>;
  DistillHeader d;
  if (std::fread(&d, sizeof d, 1, in) != 1) std::abort();
  DistillFwd a = {};
  read_common<T>(h, x, a);
  a.wide = d.wide != 0;
  a.teacher_stride = a.logits_stride;
  a.table_rows = d.table_rows;
  const int64_t taught =
      d.has_index != 0 ? (a.table_rows - 1) * a.teacher_stride + h.C : elements(h);
  a.teacher = read_array(taught * (a.wide ? sizeof(A) : sizeof(T)), "teacher",
                         a.wide ? phase_of_wide<T>(h) : h.phase);
  if (d.has_target != 0) a.target = reinterpret_cast<int64_t*>(read_array(h.N * 8, "target"));
  a.weight_stride = d.columns;
  if (d.has_sample_weight != 0) {
    const auto* const rows = read_array(h.N * d.columns * sizeof(A), "sample_weight");
    a.sample_weight = rows + (d.columns - 1) * sizeof(A);
    a.share = d.columns == 2 ? rows : nullptr;
  }
  if (d.has_index != 0)
    a.teacher_index = reinterpret_cast<int64_t*>(read_array(h.N * 8, "teacher_index"));
  a.kd_weight = d.kd_weight;
  a.tckd_weight = d.tckd_weight;
  a.nckd_weight = d.nckd_weight;
  a.soft_target_weight = d.soft_target_weight;
  a.max_weight = d.max_weight;
  a.temperature = d.temperature;
  a.divergence = d.divergence != 0;
  a.probabilities = d.probabilities != 0;
  return a;
}

Device device_of(const Header& h) {
  return {h.clusters != 0 ? 9 : 8, 0, static_cast<int>(h.multiprocessors), 227 * 1024};
}

/// A plan whose threads and blocks a case may choose.
LossPlan chosen(const Header& h, LossPlan plan) {
  if (h.threads != 0) plan.threads = static_cast<int>(h.threads);
  plan.blocks = h.blocks != 0 ? static_cast<int>(h.blocks) : 2;
  return plan;
}

template <class T>
LossPlan plan_case(const Header& h, const LossGeneral& a, Dtype dtype) {
  const Device device = device_of(h);
  LossPlan plan = plan_loss(a, dtype, device);
  if (plan.kernel == LossPlan::kGeneral) return chosen(h, plan);
  if (h.kernel >= 0) {  // a kernel of the test's choice, laid out as the plan would
    plan.kernel = static_cast<LossPlan::Kernel>(h.kernel);
    plan.threads = static_cast<int>(h.threads);
    plan.cluster = static_cast<int>(h.cluster);
    const uint32_t vectors = vectors_of(h.C, kVector<T>);
    plan.vectors = h.kernel == LossPlan::kLong ? 0 : (vectors + plan.cluster - 1) / plan.cluster;
    const int rows = plan.lanes() == 0 ? 1 : plan.threads / plan.lanes();
    plan.groups = (h.N + rows - 1) / rows;
    plan = complete<T>(plan, a, device);
  }
  if (h.blocks != 0) plan.blocks = static_cast<int>(h.blocks) * plan.cluster;
  return plan;
}

void prepare_denominators(const Header& h, LossFwd& a) {
  a.denominators = {a.target, a.weight, a.correct, nullptr, 0, a.N, a.C, a.ignore_index};
  if (h.totals == 0) return;
  LossTotals t{a.denominators, reinterpret_cast<double*>(new_array(3 * h.totals * 8, "totals"))};
  if (loss_totals_cuda(t, static_cast<Dtype>(h.dtype), static_cast<int>(h.totals), nullptr) !=
      cudaSuccess)
    std::abort();
  a.denominators.partials = t.partials;
  a.denominators.num_partials = static_cast<int32_t>(h.totals);
}

/// The gradient over the logits, from what the launch has kept.
template <class T>
void run_kept(const Header& h, LossFwd& a, const void* grad_loss) {
  FactorsBwd b = {};
  a.grad = b.logits = const_cast<void*>(a.logits);
  b.target = a.target;
  b.votes = a.votes;
  if (!a.zipf) b.votes.P = 0;
  b.factors = a.factors;
  b.patches = a.patches;
  b.grad_loss = grad_loss;
  b.grad_loss_stride = 1;
  b.N = a.N;
  b.C = a.C;
  with_blocks(2, [&] { return loss_factors_bwd_cuda(b, static_cast<Dtype>(h.dtype), nullptr); });
}

/// The launch, as often as the case says, and its results.
template <class T, class F>
void run_planned(const Header& h, LossFwd& a, const LossPlan& plan, F launch) {
  using A = Arithmetic<T>;
  if (h.reduction != kNone)
    a.sums = reinterpret_cast<double*>(new_array(2 * plan.blocks * 8, "sums"));
  for (int64_t r = 0; r < h.repeats; r++)
    if (launch() != cudaSuccess) std::abort();
  if (a.factors != nullptr) run_kept<T>(h, a, read_array(h.N * sizeof(A), "grad_loss"));
  const size_t results = results_of(h);
  const int64_t chosen[4] = {plan.kernel, plan.threads, plan.cluster, *a.tile_counter};
  write_result({{a.loss, results * sizeof(A)},
                {a.ce_out, results * sizeof(A)},
                {a.zipf_out, results * sizeof(A)},
                {a.grad, h.with_grad != 0 ? h.N * h.C * sizeof(T) : 0},
                {a.grad_scale, sizeof(A)},
                {chosen, sizeof chosen}});
}

/// The launches of a call, as register.cpp makes them.
template <class T>
void run_loss(const Header& h, const Numbers& x) {
  const auto dtype = static_cast<Dtype>(h.dtype);
  LossGeneral a = read_loss<T>(h, x);
  const bool soft = a.probabilities != nullptr;
  if (a.only_correct && a.zipf && (soft || a.reduction == kMean)) {
    auto* const correct = reinterpret_cast<int32_t*>(new_array(h.N * 4, "correct"));
    with_blocks(3, [&] { return loss_correct_cuda(a, dtype, correct, nullptr); });
    a.correct = correct;
  }
  if (h.in_place == kKept) {
    a.factors = new_array(h.N * kFactors * sizeof(Arithmetic<T>), "factors");
    a.patches = new_array(h.N * counted_votes(a) * sizeof(T), "patches");
  }
  if (!soft) prepare_denominators(h, a);
  const LossPlan plan = plan_case<T>(h, a, dtype);
  run_planned<T>(h, a, plan, [&] { return loss_fwd_cuda(a, dtype, plan, nullptr); });
}

template <class T>
void run_distill(const Header& h, const Numbers& x) {
  const auto dtype = static_cast<Dtype>(h.dtype);
  DistillFwd a = read_distill<T>(h, x);
  if (a.target != nullptr) prepare_denominators(h, a);
  const LossPlan plan = chosen(h, plan_distill(a, dtype, device_of(h)));
  run_planned<T>(h, a, plan, [&] { return distill_fwd_cuda(a, dtype, plan, nullptr); });
}

template <class T>
void run_backward(const Header& h) {
  using A = Arithmetic<T>;
  LossBwd a = {};
  a.N = h.N;
  a.C = h.C;
  void* const grad = read_array(h.N * h.C * sizeof(T), "grad", h.phase);
  a.grad = grad;
  a.grad_loss_stride = h.grad_loss_stride;
  a.grad_loss = read_array(((h.N - 1) * h.grad_loss_stride + 1) * sizeof(A), "grad_loss");
  if (h.scaled != 0) a.grad_scale = read_array(sizeof(A), "grad_scale");
  a.out = h.in_place != 0 ? grad : new_array(h.N * h.C * sizeof(T), "out", h.row_gap);
  with_blocks(2, [&] { return loss_bwd_cuda(a, static_cast<Dtype>(h.dtype), nullptr); });
  write_result({{a.out, h.N * h.C * sizeof(T)}});
}

void run_label(const Header& h) {
  LabelFwd a = {};
  a.N = h.N;
  a.C = static_cast<int32_t>(h.C);
  a.ignore_index = h.ignore_index;
  a.dense = h.dense != 0;
  a.votes = read_votes(h);
  const bool ranks = h.op == kRank;
  const size_t size = ranks || h.dtype != kFloat64 ? 4 : 8, bytes = h.N * h.C * size;
  if (!ranks) {
    a.target = reinterpret_cast<int64_t*>(read_array(h.N * 8, "target"));
    a.log_mass = read_array((a.dense ? h.N * h.C : h.R) * size, "log_mass");
  }
  a.out = new_array(bytes, ranks ? "rank" : "label");
  with_blocks(2, [&] {
    return ranks ? rank_fwd_cuda(a, nullptr)
                 : label_fwd_cuda(a, static_cast<Dtype>(h.dtype), nullptr);
  });
  write_result({{a.out, bytes}});
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  in = std::fopen(argv[1], "rb");
  out = std::fopen(argv[2], "wb");
  if (in == nullptr || out == nullptr) return 2;
  Header h;
  Numbers x;
  while (std::fread(&h, sizeof h, 1, in) == 1 && std::fread(&x, sizeof x, 1, in) == 1) {
    sim::schedule = {static_cast<sim::Schedule::Order>(h.order),
                     static_cast<sim::Schedule::Fill>(h.fill), static_cast<uint64_t>(h.seed),
                     h.late != 0};
    const auto dtype = static_cast<Dtype>(h.dtype);
    if (h.op == kLoss || h.op == kSoftLoss) {
      with_type(dtype, [&](auto t) { run_loss<decltype(t)>(h, x); });
    } else if (h.op == kDistill) {
      with_type(dtype, [&](auto t) { run_distill<decltype(t)>(h, x); });
    } else if (h.op == kBackward) {
      with_type(dtype, [&](auto t) { run_backward<decltype(t)>(h); });
    } else if (h.op == kFault) {
      const int result = sim::run_faulty_kernel(static_cast<int>(h.kernel));
      write_result({{&result, 4}});
    } else {
      run_label(h);
    }
    sim::forget_watched();
    arrays.clear();
  }
  std::fclose(out);
  return 0;
}
