// Runs cases that tests/test_cuda_logic.py wrote to a file through the CUDA kernels, on the CPU.
//
//     driver CASES RESULTS
//
// A case is kHeader int64 (Header, in order), kNumbers float64 and the arrays that its operator
// reads; a result is the number of bytes of text (faults; empty: none), the text, and the arrays
// that the operator writes.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "runtime.h"
// The kernels, unchanged.
#include "../../csrc/cuda/label.cuh"
#include "../../csrc/cuda/loss_bwd.cuh"
#include "../../csrc/cuda/loss_dense.cuh"
#include "../../csrc/cuda/loss_long.cuh"
#include "../../csrc/cuda/loss_plan.h"
#include "../../csrc/cuda/soft_loss.cuh"

#include "faults.cuh"

// Element types this build has kernels for, as bits 1 << Dtype: fewer compile faster.
#ifndef HARNESS_DTYPES
#define HARNESS_DTYPES 15
#endif

using namespace zipfls::cuda;

namespace {

enum Operator { kLoss, kBackward, kRank, kLabel, kFault, kSoftLoss };

struct Header {
  int64_t op, dtype, N, C, P, wide, has_votes, dense, has_weight, ce, zipf, only_correct,
      ignore_index, reduction, with_grad, scaled, phase,
      row_gap;  // phase: bytes past a 16-byte boundary; row_gap: elements between rows
  int64_t kernel, threads, cluster;  // kernel: LossPlan::Kernel, or -1: as the launcher plans
  int64_t blocks, totals, multiprocessors,
      clusters;  // blocks: 0: as planned; totals: blocks of loss_totals
  int64_t order, fill, seed;
  int64_t R, grad_loss_stride, in_place, repeats;
};
struct Numbers {
  double ce_weight, zipf_weight, label_smoothing;
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
    std::memset(memory.get(), 0xff, bytes + phase);  // NaN, -1: what nobody writes shows
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

template <class F>
void with_type(int64_t dtype, F f) {
  if constexpr ((HARNESS_DTYPES & 1) != 0)
    if (dtype == kFloat32) return f(float{});
  if constexpr ((HARNESS_DTYPES & 2) != 0)
    if (dtype == kFloat64) return f(double{});
  if constexpr ((HARNESS_DTYPES & 4) != 0)
    if (dtype == kBFloat16) return f(bfloat16{});
  if constexpr ((HARNESS_DTYPES & 8) != 0)
    if (dtype == kFloat16) return f(float16{});
  std::fprintf(stderr, "this build has no kernels for dtype %d\n", static_cast<int>(dtype));
  std::abort();
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

/// A loss's arguments from the file, and memory for its results; `between` reads what stands
/// between logits and votes.
template <class T, class F>
LossFwd read_loss(const Header& h, const Numbers& x, F between) {
  using A = Arithmetic<T>;
  LossFwd a = {};
  a.logits_stride = h.C + h.row_gap;
  unsigned char* const logits = read_array(elements(h) * sizeof(T), "logits", h.phase);
  a.logits = logits;
  between(a);
  a.votes = read_votes(h);
  a.log_mass = read_array((h.dense != 0 ? h.N * h.C : h.R) * sizeof(A), "log_mass");
  if (h.has_weight != 0) a.weight = read_array(h.C * sizeof(A), "weight");
  a.N = h.N;
  a.C = static_cast<int32_t>(h.C);
  a.ignore_index = h.ignore_index;
  a.ce = h.ce != 0;
  a.zipf = h.zipf != 0;
  a.only_correct = h.only_correct != 0;
  a.ce_weight = x.ce_weight;
  a.zipf_weight = x.zipf_weight;
  a.label_smoothing = x.label_smoothing;
  a.reduction = static_cast<int32_t>(h.reduction);
  a.scaled = h.scaled != 0;
  const size_t results = results_of(h);
  a.loss = new_array(results * sizeof(A), "loss");
  a.ce_out = new_array(results * sizeof(A), "ce");
  a.zipf_out = new_array(results * sizeof(A), "zipf");
  if (h.with_grad != 0)
    a.grad = h.in_place != 0 ? logits : new_array(h.N * h.C * sizeof(T), "grad", h.phase);
  a.grad_scale = new_array(sizeof(A), "grad_scale");
  arrays.push_back(std::make_unique<Array>(4));
  a.tile_counter = reinterpret_cast<uint32_t*>(arrays.back()->data());
  *a.tile_counter = 0;
  sim::watch(a.tile_counter, 4, true, "tile_counter");
  return a;
}

/// Scratch for the sums over the rows.
void give_sums(const Header& h, LossFwd& a, int64_t blocks) {
  if (h.reduction != kNone) a.sums = reinterpret_cast<double*>(new_array(2 * blocks * 8, "sums"));
}

template <class T>
void write_loss(const Header& h, const LossFwd& a, const LossPlan& plan) {
  using A = Arithmetic<T>;
  const size_t results = results_of(h);
  const int64_t chosen[4] = {plan.kernel, plan.threads, plan.cluster, *a.tile_counter};
  write_result({{a.loss, results * sizeof(A)},
                {a.ce_out, results * sizeof(A)},
                {a.zipf_out, results * sizeof(A)},
                {a.grad, h.with_grad != 0 ? h.N * h.C * sizeof(T) : 0},
                {a.grad_scale, sizeof(A)},
                {chosen, sizeof chosen}});
}

template <class T>
void run_loss(const Header& h, const Numbers& x, const sim::Schedule& schedule) {
  using A = Arithmetic<T>;
  const Device device{static_cast<int>(h.multiprocessors), 227 * 1024, h.clusters != 0};
  LossFwd a = read_loss<T>(h, x, [&](LossFwd& a) {
    a.target = reinterpret_cast<int64_t*>(read_array(h.N * 8, "target"));
  });
  LossLaunch l = loss_launch<T>(a, device);
  if (h.kernel >= 0) {  // a kernel of the test's choice, laid out as the plan would
    l.plan.kernel = static_cast<LossPlan::Kernel>(h.kernel);
    l.plan.threads = static_cast<int>(h.threads);
    l.plan.cluster = static_cast<int>(h.cluster);
    const uint32_t vectors = vectors_of(h.C, kVector<T>);
    l.plan.vectors =
        h.kernel == LossPlan::kLong ? 0 : (vectors + l.plan.cluster - 1) / l.plan.cluster;
    const int rows = h.kernel == LossPlan::kLanes8    ? l.plan.threads / 8
                     : h.kernel == LossPlan::kLanes32 ? l.plan.threads / 32
                                                      : 1;
    l.plan.groups = (h.N + rows - 1) / rows;
    l = launch_of<T>(a, l.plan, device);
  }
  if (h.dense != 0) {
    SmemAllocator smem{nullptr};
    BlockArea<A>::allocate(smem);
    smem.allocate<A>(kDenseBlock / kWarp);
    l.plan.threads = kDenseBlock;
    l.plan.cluster = 1;
    l.shared = smem.used;
    l.blocks = 2;
  }
  if (h.blocks != 0) l.blocks = static_cast<int>(h.blocks) * l.plan.cluster;

  if (h.only_correct != 0 && h.reduction == kMean && h.zipf != 0) {
    LossCorrect c{a.logits, a.logits_stride, a.target, a.N, a.C, a.ignore_index, nullptr};
    c.correct = reinterpret_cast<int32_t*>(new_array(h.N * 4, "correct"));
    sim::launch([&] { loss_correct_kernel<T>(c); }, 3, kCorrectBlock, 1, 0, schedule);
    a.correct = c.correct;
  }
  a.denominators = {a.target, a.weight, a.correct, nullptr, 0, a.N, a.C, a.ignore_index};
  if (h.totals != 0) {
    LossTotals t{a.denominators, reinterpret_cast<double*>(new_array(3 * h.totals * 8, "totals"))};
    SmemAllocator smem{nullptr};
    BlockArea<A>::allocate(smem);
    sim::launch([&] { loss_totals_kernel<A>(t); }, h.totals, kTotalsBlock, 1, smem.used, schedule);
    a.denominators.partials = t.partials;
    a.denominators.num_partials = static_cast<int32_t>(h.totals);
  }
  give_sums(h, a, l.blocks);
  const auto kernel = [&] {
    if (h.dense != 0) return loss_dense_kernel<T>(a);
    switch (l.plan.kernel) {
      case LossPlan::kLanes8:
        return loss_fwd_kernel<T, 8>(a, l.row_bytes, l.plan.vectors);
      case LossPlan::kLanes32:
        return loss_fwd_kernel<T, 32>(a, l.row_bytes, l.plan.vectors);
      case LossPlan::kBlock:
        return loss_fwd_kernel<T, 0>(a, l.row_bytes, l.plan.vectors);
      case LossPlan::kCluster:
        return loss_fwd_cluster_kernel<T>(a, l.row_bytes, l.plan.vectors);
      default:
        return loss_fwd_long_kernel<T>(a);
    }
  };
  for (int64_t r = 0; r < h.repeats; r++)
    sim::launch(kernel, l.blocks, l.plan.threads, l.plan.cluster, l.shared, schedule);
  write_loss<T>(h, a, l.plan);
}

template <class T>
void run_soft_loss(const Header& h, const Numbers& x, const sim::Schedule& schedule) {
  using A = Arithmetic<T>;
  SoftLossFwd s = {};
  s.loss = read_loss<T>(h, x, [&](LossFwd&) {
    const size_t phase = h.phase / sizeof(T) * sizeof(A) % 16;
    s.target = read_array(elements(h) * sizeof(A), "target", phase);
  });
  LossFwd& a = s.loss;
  s.target_stride = a.logits_stride;
  s.dense = h.dense != 0;
  if (h.only_correct != 0 && h.zipf != 0) {
    auto* const correct = reinterpret_cast<int32_t*>(new_array(h.N * 4, "correct"));
    sim::launch([&] { soft_correct_kernel<T>(s, correct); }, 3, kCorrectBlock, 1,
                kWarp * 8 + ZIPFLS_RED_ZONE, schedule);
    a.correct = correct;
  }
  const uint32_t blocks = h.blocks != 0 ? h.blocks : 2;
  give_sums(h, a, blocks);
  LossPlan plan = {};
  plan.threads = h.threads != 0 ? static_cast<int>(h.threads) : soft_threads<T>(a.C);
  for (int64_t r = 0; r < h.repeats; r++)
    sim::launch(
        [&] { s.dense ? soft_loss_fwd_kernel<T, true>(s) : soft_loss_fwd_kernel<T, false>(s); },
        blocks, plan.threads, 1, soft_shared_bytes<T>(s), schedule);
  write_loss<T>(h, a, plan);
}

template <class T>
void run_backward(const Header& h, const sim::Schedule& schedule) {
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
  sim::launch([&] { loss_bwd_kernel<T>(a); }, 2, kScaleBlock, 1, 0, schedule);
  write_result({{a.out, h.N * h.C * sizeof(T)}});
}

template <class A>
void run_label(const Header& h, const sim::Schedule& schedule) {
  LabelFwd a = {};
  a.N = h.N;
  a.C = static_cast<int32_t>(h.C);
  a.ignore_index = h.ignore_index;
  a.dense = h.dense != 0;
  a.votes = read_votes(h);
  SmemAllocator smem{nullptr};
  size_t bytes = h.N * h.C * 4;
  if (h.op == kRank) {
    VoteTables<float>::allocate(smem, a.votes.P, a.C, false);
    a.out = new_array(bytes, "rank");
    sim::launch([&] { rank_fwd_kernel(a); }, 2, kLabelBlock, 1, smem.used, schedule);
  } else {
    a.target = reinterpret_cast<int64_t*>(read_array(h.N * 8, "target"));
    a.log_mass = read_array((a.dense ? h.N * h.C : h.R) * sizeof(A), "log_mass");
    smem.allocate<A>(kLabelBlock / kWarp);
    VoteTables<A>::allocate(smem, a.dense ? 0 : a.votes.P, a.C, false);
    bytes = h.N * h.C * sizeof(A);
    a.out = new_array(bytes, "label");
    sim::launch([&] { label_fwd_kernel<A>(a); }, 2, kLabelBlock, 1, smem.used, schedule);
  }
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
    const sim::Schedule schedule{static_cast<sim::Schedule::Order>(h.order),
                                 static_cast<sim::Schedule::Fill>(h.fill),
                                 static_cast<uint64_t>(h.seed)};
    if (h.op == kLoss) {
      with_type(h.dtype, [&](auto t) { run_loss<decltype(t)>(h, x, schedule); });
    } else if (h.op == kSoftLoss) {
      with_type(h.dtype, [&](auto t) { run_soft_loss<decltype(t)>(h, x, schedule); });
    } else if (h.op == kBackward) {
      with_type(h.dtype, [&](auto t) { run_backward<decltype(t)>(h, schedule); });
    } else if (h.op == kFault) {
      const int result = sim::run_faulty_kernel(static_cast<int>(h.kernel), schedule);
      write_result({{&result, 4}});
    } else if (h.dtype == kFloat64) {
      run_label<double>(h, schedule);
    } else {
      run_label<float>(h, schedule);
    }
    sim::forget_watched();
    arrays.clear();
  }
  std::fclose(out);
  return 0;
}
