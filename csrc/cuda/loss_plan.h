// A loss's launch, from its arguments and the device: what the launcher does and the tests' harness
// repeats.
#pragma once

#include "loss_rows.cuh"

namespace zipfls::cuda {

struct LossLaunch {
  LossPlan plan;
  uint32_t row_bytes;  // shared memory of one row
  uint32_t shared;     // and of a block
  int blocks;
};

/// The launch of a plan: its shared memory and its grid.
template <class T>
LossLaunch launch_of(const LossFwd& a, const LossPlan& plan, const Device& device) {
  const int32_t P = counted_votes(a);
  const bool lanes8 = plan.kernel == LossPlan::kLanes8, lanes32 = plan.kernel == LossPlan::kLanes32;
  SmemAllocator row{nullptr}, block{nullptr};
  RowArea<T>::allocate(row, plan.vectors, P, a.C, a.grad != nullptr, !lanes8 && !lanes32);
  BlockArea<Arithmetic<T>>::allocate(block);
  LossLaunch launch;
  launch.plan = plan;
  launch.row_bytes = row.used;
  launch.shared = block.used + row.used * (lanes8    ? plan.threads / 8
                                           : lanes32 ? plan.threads / kWarp
                                                     : 1);

  // As many blocks as are resident, if the multiprocessor has the registers and the shared memory,
  // so that all end together: more would run in waves, the last of them nearly empty. Without rows
  // one block, to fold nothing.
  const int64_t by_threads = kThreadsPerMultiprocessor / plan.threads;
  const int64_t by_registers = kRegistersPerMultiprocessor / (kRegisters<T> * plan.threads);
  const int64_t by_shared = device.shared_per_block / (launch.shared + kReservedShared);
  int64_t resident = by_threads < by_registers ? by_threads : by_registers;
  resident = by_shared < resident ? by_shared : resident;
  resident = resident < 1 ? 1 : resident;
  int64_t passes = resident * device.multiprocessors / plan.cluster;
  passes = plan.groups < passes ? plan.groups : passes;
  launch.blocks = static_cast<int>((passes < 1 ? 1 : passes) * plan.cluster);
  return launch;
}

template <class T>
LossLaunch loss_launch(const LossFwd& a, const Device& device) {
  SmemAllocator tables{nullptr};
  VoteTables<Arithmetic<T>>::allocate(tables, counted_votes(a), a.C, a.grad != nullptr);
  return launch_of<T>(a, plan_loss(a.N, a.C, counted_votes(a), kVector<T>, tables.used, device),
                      device);
}

}  // namespace zipfls::cuda
