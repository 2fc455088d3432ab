// A GPU's blocks and clusters on the CPU, for the vote kernels: one fiber per CUDA thread, and
// csrc/cuda/ptx.cuh's functions written out from the PTX ISA's description of each
// instruction, independently of the kernels' own index arithmetic.
//
// What is asynchronous on a GPU is made as late, or as early, as the rules allow:
//   cp.async      the destination is poisoned when the copy starts; the bytes come when a thread
//   waits for its group
//                 (late) or at once (early);
//   bulk copies   the same, and late ones come when nothing else can run, or at random;
//   wgmma         operands are read, and accumulators written, when the group is waited for (late)
//   or at once;
//   pairs         others see them when they are released (late) or at once.
// Shared memory starts as noise. Threads run in ascending, descending or random order of warps.
// Deadlocks, collectives in which the threads disagree, misaligned or outside addresses, and
// barriers that overflow are errors.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "vote_layout.cuh"

#define ZIPFLS_DEVICE inline

namespace emulator {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// How a run is scheduled.
struct Schedule {
  enum Order { kAscending, kDescending, kRandom } order = kAscending;
  bool late = true;
  unsigned seed = 0;
};

// Fibers ------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what a call must preserve on the old stack, and returns on the new one.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
#else
#error "the fibers of this emulator are written for x86-64"
#endif

constexpr size_t kStackBytes = 64 << 10;

struct Block;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  int thread = 0;
  bool done = false;
  std::function<bool()> ready;  // empty: may run
  const char* at = "";
  // cp.async
  struct Copy {
    char* to;
    const void* from;
    uint32_t bytes;
  };
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::vector<std::function<void()>> stores;  // of pairs, that no other thread sees yet
};

/// Threads that act together: all must call the same thing.
struct Collective {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
  const char* what = "";
  std::vector<void*> slots;
};

struct MBarrier {
  uint32_t expected, pending;  // arrivals
  int64_t bytes;               // still to come
  uint32_t phase;
};

/// Products of a warpgroup. Each warp goes through the same sequence of them at its own pace; one
/// is multiplied when all four have issued it.
struct Warpgroup {
  struct Product {
    int warps = 0;  // that have issued it
    bool done = false;
    std::vector<void*> calls;  // of the threads so far
    std::function<void()> multiply;
  };
  std::deque<Product> products;  // all, in order
  struct Warp {
    size_t issued = 0;                 // products
    std::vector<size_t> groups = {0};  // products issued when each group was committed
  } warps[4];
};

struct Block {
  int rank = 0, live = 0;    // threads still running
  std::vector<char> memory;  // shared
  char* arena = nullptr;
  size_t arena_bytes = 0;
  std::vector<Collective> warps;
  std::vector<Collective> warpgroups;
  std::vector<Warpgroup> products;
  std::vector<std::vector<std::function<void()>>>
      stores;  // by warp: ordered before its next release
  Collective all;
  Collective named[16];
  std::vector<std::pair<void*, MBarrier>> barriers;

  /// Its shared memory is there as long as a thread of it runs.
  MBarrier& barrier(void* at) {
    if (live == 0) throw Fault("shared memory of a block that has ended");
    for (auto& b : barriers)
      if (b.first == at) return b.second;
    throw Fault("an mbarrier that was never initialised");
  }
};

struct Pending {
  std::function<void()> complete;
};

struct Machine {
  Schedule schedule;
  std::mt19937 random;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber> fibers;
  Collective cluster;
  std::deque<Pending> bulk;
  std::vector<std::shared_ptr<void>> calls;  // what threads gave to products
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  std::string fault;
  std::function<void(int block, int thread)> body;
};

inline Machine*& machine() {
  static Machine* instance = nullptr;
  return instance;
}
inline Fiber& self() { return *machine()->current; }
inline Block& block() { return *self().block; }

inline void pause(const char* at, std::function<bool()> ready) {
  Fiber& fiber = self();
  fiber.at = at;
  fiber.ready = std::move(ready);
  emulator_switch(&fiber.stack_pointer, machine()->scheduler);
}

[[noreturn]] inline void fail(const std::string& what) {
  Machine& m = *machine();
  if (m.fault.empty())
    m.fault = what + " (thread " + std::to_string(self().thread) + ", block " +
              std::to_string(block().rank) + ")";
  self().done = true;
  emulator_switch(&self().stack_pointer, m.scheduler);
  std::abort();
}

inline void fiber_main() {
  Machine& m = *machine();
  try {
    m.body(self().block->rank, self().thread);
  } catch (const Fault& fault) {
    if (m.fault.empty()) m.fault = fault.what();
  }
  self().done = true;
  emulator_switch(&self().stack_pointer, m.scheduler);
  std::abort();
}

/// All of a collective's threads, with an argument each; the last one runs `act`.
inline void together(Collective& who, int slot, const char* what, void* argument,
                     const std::function<void(std::vector<void*>&)>& act = {}) {
  if (who.arrived == 0) {
    who.what = what;
    who.slots.assign(static_cast<size_t>(who.size), nullptr);
  } else if (std::strcmp(who.what, what) != 0) {
    fail(std::string("threads disagree: ") + who.what + " and " + what);
  }
  who.slots[static_cast<size_t>(slot)] = argument;
  if (++who.arrived == who.size) {
    who.arrived = 0;
    who.generation++;
    if (act) act(who.slots);
    return;
  }
  const uint64_t generation = who.generation;
  pause(what, [&who, generation] { return who.generation != generation; });
}

inline void together_warp(const char* what, void* argument,
                          const std::function<void(std::vector<void*>&)>& act = {}) {
  together(block().warps[static_cast<size_t>(self().thread / 32)], self().thread % 32, what,
           argument, act);
}
inline void together_group(const char* what, void* argument,
                           const std::function<void(std::vector<void*>&)>& act = {}) {
  together(block().warpgroups[static_cast<size_t>(self().thread / 128)], self().thread % 128, what,
           argument, act);
}

/// Runs a cluster of `blocks` blocks of `threads` threads; shared: bytes of each. body(rank,
/// thread).
inline void run_cluster(const Schedule& schedule, int blocks, int threads, size_t shared,
                        std::function<void(int, int)> body) {
  static std::vector<char*> stacks;  // kept from run to run
  Machine m;
  machine() = &m;
  m.schedule = schedule;
  m.random.seed(schedule.seed);
  m.body = std::move(body);
  m.cluster.size = blocks * threads;
  for (int b = 0; b < blocks; b++) {
    m.blocks.push_back(std::make_unique<Block>());
    Block& block = *m.blocks.back();
    block.rank = b;
    block.live = threads;
    block.memory.resize(shared + 2048);
    for (size_t i = 0; i < block.memory.size(); i++)
      block.memory[i] =
          static_cast<char>(schedule.order == Schedule::kAscending ? 0xff : m.random());
    block.arena = block.memory.data();
    block.arena += (1024 - reinterpret_cast<uintptr_t>(block.arena) % 1024) % 1024;
    block.arena_bytes = shared;
    block.all.size = threads;
    block.warps.resize(static_cast<size_t>(threads / 32));
    for (auto& w : block.warps) w.size = 32;
    block.warpgroups.resize(static_cast<size_t>(threads / 128 + 1));
    for (auto& w : block.warpgroups) w.size = 128;
    block.products.resize(block.warpgroups.size());
    block.stores.resize(block.warps.size());
  }
  const size_t count = static_cast<size_t>(blocks) * static_cast<size_t>(threads);
  while (stacks.size() < count) {
    void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw Fault("no memory for stacks");
    mprotect(stack, 4096, PROT_NONE);
    stacks.push_back(static_cast<char*>(stack));
  }
  m.fibers.resize(count);
  for (size_t i = 0; i < count; i++) {
    Fiber& fiber = m.fibers[i];
    fiber.block = m.blocks[i / static_cast<size_t>(threads)].get();
    fiber.thread = static_cast<int>(i % static_cast<size_t>(threads));
    fiber.stack = stacks[i];
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
    *--top = nullptr;  // where fiber_main would return to
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int r = 0; r < 6; r++) *--top = nullptr;
    fiber.stack_pointer = top;
  }

  const size_t warps = count / 32;
  std::vector<size_t> order(warps);
  for (size_t i = 0; i < warps; i++)
    order[i] = schedule.order == Schedule::kDescending ? warps - 1 - i : i;
  std::vector<char> lazy(warps, 0);
  size_t left = count, rounds = 0;
  while (left > 0 && m.fault.empty()) {
    if (schedule.order == Schedule::kRandom) {
      std::shuffle(order.begin(), order.end(), m.random);
      if (rounds++ % 256 == 0)
        for (char& is : lazy) is = m.random() % 4 == 0;
    }
    bool moved = false;
    for (const size_t warp : order) {
      // Some warps fall far behind the others, as far as barriers let them.
      if (schedule.order == Schedule::kRandom &&
          (lazy[warp] ? m.random() % 64 != 0 : m.random() % 4 == 0))
        continue;
      for (size_t lane = 0; lane < 32; lane++) {
        Fiber& fiber =
            m.fibers[warp * 32 + (schedule.order == Schedule::kDescending ? 31 - lane : lane)];
        if (fiber.done || (fiber.ready && !fiber.ready())) continue;
        moved = true;
        fiber.ready = nullptr;
        m.current = &fiber;
        emulator_switch(&m.scheduler, fiber.stack_pointer);
        if (fiber.done) left--, fiber.block->live--;
        if (!m.fault.empty()) break;
      }
      if (!m.fault.empty()) break;
    }
    const bool some_bulk = schedule.order == Schedule::kRandom && m.random() % 8 == 0;
    if (!m.bulk.empty() && m.fault.empty() && (!moved || some_bulk)) {
      // Copies have no order among each other.
      const size_t which = schedule.order == Schedule::kAscending ? 0 : m.random() % m.bulk.size();
      const Pending next = m.bulk[which];
      m.bulk.erase(m.bulk.begin() + static_cast<std::ptrdiff_t>(which));
      try {
        next.complete();
      } catch (const Fault& fault) {
        m.fault = fault.what();
      }
    } else if (!moved && left > 0 && m.fault.empty()) {
      bool stuck = true;  // or only held back
      std::string where;
      for (const Fiber& fiber : m.fibers) {
        if (fiber.done) continue;
        stuck = stuck && fiber.ready && !fiber.ready();
        if (fiber.thread % 32 == 0)
          where += " [block " + std::to_string(fiber.block->rank) + " warp " +
                   std::to_string(fiber.thread / 32) + " at " + fiber.at + "]";
      }
      if (stuck) m.fault = "deadlock:" + where;
    }
  }
  for (const auto& block : m.blocks)
    for (const auto& stores : block->stores)
      for (const auto& store : stores) store();
  for (const Fiber& fiber : m.fibers)
    for (const auto& store : fiber.stores) store();
  std::string fault = m.fault;
  if (fault.empty() && !m.bulk.empty()) fault = "copies outlive the kernel";
  machine() = nullptr;
  if (!fault.empty()) throw Fault(fault);
}

// Elements as the tensor cores read them ----------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class Element>
float tensor_core_value(const char* at);
template <>
inline float tensor_core_value<zipfls::cuda::BFloat16>(const char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  return bits_to_float(static_cast<uint32_t>(x) << 16);
}
template <>
inline float tensor_core_value<zipfls::cuda::Float16>(const char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}
template <>
inline float tensor_core_value<zipfls::cuda::TensorFloat32>(const char* at) {
  uint32_t x;
  std::memcpy(&x, at, 4);
  return bits_to_float(x & 0xffffe000u);  // the low 13 bits are not looked at
}

}  // namespace emulator

namespace zipfls::cuda::ptx {

using emulator::block;
using emulator::fail;
using emulator::self;

constexpr uint32_t kSharedBase = 1024;  // address of a block's first byte

inline uint32_t shared_address(const void* at) {
  const std::ptrdiff_t offset = static_cast<const char*>(at) - block().arena;
  if (offset < 0 || static_cast<size_t>(offset) >= block().arena_bytes)
    fail("not an address of shared memory");
  return static_cast<uint32_t>(offset) + kSharedBase;
}
inline char* shared_pointer(emulator::Block& where, uint32_t address, size_t bytes,
                            uint32_t alignment) {
  if (address < kSharedBase || address - kSharedBase + bytes > where.arena_bytes)
    fail("outside shared memory");
  if (address % alignment != 0) fail("misaligned shared memory");
  return where.arena + (address - kSharedBase);
}

template <class T>
T ld_global_cs(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) fail("misaligned device memory");
  return *at;
}
template <class Vector>
void st_global_cg(void* at, const Vector& x) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail("misaligned device memory");
  std::memcpy(at, &x, 16);
}
inline void block_sync() { emulator::together(block().all, self().thread, "block_sync", nullptr); }
inline void warp_sync() {
  emulator::together_warp("warp_sync", &self(), [](std::vector<void*>& lanes) {
    auto& ordered = block().stores[static_cast<size_t>(self().thread / 32)];
    for (void* lane : lanes) {
      auto& stores = static_cast<emulator::Fiber*>(lane)->stores;
      ordered.insert(ordered.end(), stores.begin(), stores.end());
      stores.clear();
    }
  });
}
inline void cluster_sync() {
  emulator::Machine& m = *emulator::machine();
  const int slot = block().rank * block().all.size + self().thread;
  emulator::together(m.cluster, slot, "cluster_sync", nullptr);
}
inline void named_barrier_sync(int barrier, int threads) {
  if (barrier < 1 || barrier > 15) fail("no such barrier");
  emulator::Collective& who = block().named[barrier];
  if (who.size == 0) who.size = threads;
  if (who.size != threads) fail("threads disagree about a barrier's size");
  emulator::together(who, who.arrived, "named_barrier_sync", nullptr);
}
inline uint32_t cluster_rank() { return static_cast<uint32_t>(block().rank); }

template <class T>
T shfl(T x, int from, const char* what = "shuffle") {
  struct Call {
    T in, out;
    int from;
  } call = {x, x, from};
  emulator::together_warp(what, &call, [](std::vector<void*>& lanes) {
    for (void* lane : lanes) {
      Call& mine = *static_cast<Call*>(lane);
      mine.out = static_cast<Call*>(lanes[static_cast<size_t>(mine.from)])->in;
    }
  });
  return call.out;
}
template <class T>
T shfl_xor(T x, int mask) {
  return shfl(x, self().thread % 32 ^ mask, "shfl_xor");
}

// Pairs that other blocks read --------------------------------------------------------------------

/// Late, a pair is stored when its thread releases, or one that it has met at a barrier before, and
/// else when the kernel ends.
template <class T>
void st_global_cg_8(T* at, T x) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) fail("misaligned device memory");
  const auto store = [=] { *at = x; };
  if (emulator::machine()->schedule.late) {
    self().stores.push_back(store);
  } else {
    store();
  }
}
template <class T>
T ld_global_cg_8(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) fail("misaligned device memory");
  return *at;
}
inline uint32_t atom_inc_release(uint32_t* counter, uint32_t last) {
  auto& ordered = block().stores[static_cast<size_t>(self().thread / 32)];
  for (const auto& store : ordered) store();
  ordered.clear();
  for (const auto& store : self().stores) store();
  self().stores.clear();
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline void fence_acq_rel() { emulator::together_warp("acquire", nullptr); }

// cp.async ----------------------------------------------------------------------------------------

inline void finish(const emulator::Fiber::Copy& copy) {
  std::memset(copy.to, 0, 16);
  if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
}
inline void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  if (bytes > 16) fail("cp.async of more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 && bytes > 0)
    fail("cp.async from a misaligned address");
  const emulator::Fiber::Copy copy = {shared_pointer(block(), to, 16, 16), from, bytes};
  if (emulator::machine()->schedule.late) {
    std::memset(copy.to, 0xff, 16);  // NaN
    self().open.push_back(copy);
  } else {
    finish(copy);
  }
}
inline void cp_async_commit_group() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}
template <int kPending>
void cp_async_wait_group() {
  while (self().groups.size() > kPending) {
    for (const auto& copy : self().groups.front()) finish(copy);
    self().groups.pop_front();
  }
}

// ldmatrix, mma -----------------------------------------------------------------------------------

struct MatrixCall {
  uint32_t from;
  uint32_t* x;
};
inline void ldmatrix_x4_any(uint32_t (&x)[4], uint32_t from, bool transposed) {
  MatrixCall call = {from, x};
  emulator::Block& where = block();
  emulator::together_warp(
      transposed ? "ldmatrix.trans" : "ldmatrix", &call, [&](std::vector<void*>& lanes) {
        for (size_t matrix = 0; matrix < 4; matrix++) {
          const char* rows[8];
          unsigned banks = 0;  // 16-byte groups of the 128 bytes served at once
          for (size_t r = 0; r < 8; r++) {
            const uint32_t address = static_cast<MatrixCall*>(lanes[matrix * 8 + r])->from;
            rows[r] = shared_pointer(where, address, 16, 16);
            banks |= 1u << (address / 16 % 8);
          }
          if (banks != 0xff) fail("ldmatrix with bank conflicts");
          for (size_t lane = 0; lane < 32; lane++) {
            uint16_t two[2];
            for (size_t e = 0; e < 2; e++) {
              const size_t row = transposed ? 2 * (lane % 4) + e : lane / 4;
              const size_t column = transposed ? lane / 4 : 2 * (lane % 4) + e;
              std::memcpy(&two[e], rows[row] + 2 * column, 2);
            }
            std::memcpy(static_cast<MatrixCall*>(lanes[lane])->x + matrix, two, 4);
          }
        }
      });
}
inline void ldmatrix_x4(uint32_t (&x)[4], uint32_t from) { ldmatrix_x4_any(x, from, false); }
inline void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t from) { ldmatrix_x4_any(x, from, true); }

inline void cvt_rna_tf32(uint32_t& x) {
  if ((x & 0x7f800000u) != 0x7f800000u) x += 0x1000;
  x &= (x & 0x7f800000u) != 0x7f800000u ? 0xffffe000u : 0xffffffffu;
}

struct MultiplyCall {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
/// mma.m16n8k16 (16-bit) and m16n8k8 (32-bit), fragments as the PTX ISA tabulates them.
template <class Element>
void mma_sync(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyCall call = {d, a, {b0, b1}};
  emulator::together_warp("mma", &call, [](std::vector<void*>& lanes) {
    constexpr size_t kDepth = 32 / kSize<Element>,
                     kEach = 4 / kSize<Element>;  // elements in a register
    float A[16][kDepth], B[kDepth][8];
    for (size_t lane = 0; lane < 32; lane++) {
      const MultiplyCall& call = *static_cast<MultiplyCall*>(lanes[lane]);
      const size_t group = lane >> 2, in_group = lane % 4;
      for (size_t i = 0; i < 4 * kEach; i++) {  // a0 ..
        const size_t row = i / kEach % 2 == 0 ? group : group + 8;
        const size_t column = in_group * kEach + i % kEach + (i / kEach >= 2 ? kDepth / 2 : 0);
        A[row][column] = emulator::tensor_core_value<Element>(
            reinterpret_cast<const char*>(call.a) + i * kSize<Element>);
      }
      for (size_t i = 0; i < 2 * kEach; i++) {  // b0 ..
        const size_t row = in_group * kEach + i % kEach + (i / kEach >= 1 ? kDepth / 2 : 0);
        B[row][group] = emulator::tensor_core_value<Element>(reinterpret_cast<const char*>(call.b) +
                                                             i * kSize<Element>);
      }
    }
    for (size_t lane = 0; lane < 32; lane++) {
      float* const d = static_cast<MultiplyCall*>(lanes[lane])->d;
      for (size_t i = 0; i < 4; i++) {  // c0 ..
        const size_t row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
        double sum = d[i];
        for (size_t k = 0; k < kDepth; k++) sum += static_cast<double>(A[row][k]) * B[k][column];
        d[i] = static_cast<float>(sum);
      }
    }
  });
}

// mbarriers and bulk copies -----------------------------------------------------------------------

struct alignas(8) mbarrier_t {
  char bytes[8];
};

inline void barrier_check(emulator::MBarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase++;
    b.pending = b.expected;
  }
}
inline void arrive(emulator::MBarrier& b, int64_t bytes) {
  if (b.pending == 0) fail("one arrival too many at an mbarrier");
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail("too many bytes for an mbarrier");
  b.pending--;
  barrier_check(b);
}
inline void mbarrier_init(mbarrier_t* barrier, uint32_t arrivals) {
  block().barriers.push_back({barrier, {arrivals, arrivals, 0, 0}});
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(mbarrier_t* barrier, uint32_t bytes) {
  arrive(block().barrier(barrier), bytes);
}
inline void mbarrier_arrive(mbarrier_t* barrier) { arrive(block().barrier(barrier), 0); }
/// The other block's barrier at the same address.
inline mbarrier_t* there(const void* barrier, size_t rank) {
  emulator::Block& to = *emulator::machine()->blocks[rank];
  return reinterpret_cast<mbarrier_t*>(to.arena +
                                       (static_cast<const char*>(barrier) - block().arena));
}
inline void mbarrier_arrive_cluster(mbarrier_t* barrier, uint32_t rank) {
  if (rank >= emulator::machine()->blocks.size()) fail("no such block in the cluster");
  arrive(emulator::machine()->blocks[rank]->barrier(there(barrier, rank)), 0);
}
inline void mbarrier_wait_parity(mbarrier_t* barrier, uint32_t parity) {
  emulator::Block* const where = &block();
  where->barrier(barrier);
  // The phase of that parity is complete where the current, incomplete one has the other parity.
  const auto complete = [=] { return where->barrier(barrier).phase % 2 != parity % 2; };
  if (!complete()) emulator::pause("mbarrier_wait_parity", complete);
}

/// A matrix of rows, boxes of 128 rows by 128 bytes.
struct TensorMap {
  const char* at;
  int64_t rows, stride, row_bytes;
  int element;  // bytes
};
inline void prefetch_tensormap(const TensorMap*) {}

inline void tma_load_2d_multicast(uint16_t blocks, void* to, const TensorMap* map,
                                  mbarrier_t* barrier, int32_t x, int32_t y) {
  constexpr uint32_t kBox = 128 * 128;
  for (size_t rank = 0; rank < emulator::machine()->blocks.size(); rank++) {
    if ((blocks >> rank & 1) == 0) continue;
    emulator::Block* const where = emulator::machine()->blocks[rank].get();
    const uint32_t address = shared_address(to);
    char* const first = shared_pointer(*where, address, kBox, 1024);
    mbarrier_t* const signal = there(barrier, rank);
    const auto complete = [=] {
      for (uint32_t i = 0; i < kBox; i += static_cast<uint32_t>(map->element)) {
        const int64_t row = y + static_cast<int64_t>(i / 128);
        const int64_t byte = static_cast<int64_t>(x) * map->element + i % 128;
        // 128-byte swizzle: address bits 4 to 6 are exclusive-ored with bits 7 to 9.
        const uint32_t linear = address + i, swizzled = linear ^ ((linear >> 7 & 7) << 4);
        char* const element = first + (swizzled - address);
        if (row >= 0 && row < map->rows && byte >= 0 && byte < map->row_bytes) {
          std::memcpy(element, map->at + row * map->stride + byte,
                      static_cast<size_t>(map->element));
        } else {
          std::memset(element, 0, static_cast<size_t>(map->element));
        }
      }
      emulator::MBarrier& b = where->barrier(signal);
      b.bytes -= kBox;  // may come before the bytes are announced
      barrier_check(b);
    };
    if (emulator::machine()->schedule.late) {
      std::memset(first, 0xff, kBox);
      emulator::machine()->bulk.push_back({complete});
    } else {
      complete();
    }
  }
}
inline void tma_load_2d(void* to, const TensorMap* map, mbarrier_t* barrier, int32_t x, int32_t y) {
  tma_load_2d_multicast(static_cast<uint16_t>(1u << block().rank), to, map, barrier, x, y);
}

// wgmma -------------------------------------------------------------------------------------------

template <int kRegisters>
void setmaxnreg_dec() {
  emulator::together_group("setmaxnreg", nullptr);
}
template <int kRegisters>
void setmaxnreg_inc() {
  emulator::together_group("setmaxnreg", nullptr);
}
inline emulator::Warpgroup& products() {
  return block().products[static_cast<size_t>(self().thread / 128)];
}
inline emulator::Warpgroup::Warp& products_of_warp() {
  return products().warps[self().thread % 128 / 32];
}
inline void wgmma_fence() { emulator::together_warp("wgmma.fence", nullptr); }
inline void wgmma_commit_group() {
  emulator::together_warp("wgmma.commit", nullptr, [](std::vector<void*>&) {
    products_of_warp().groups.push_back(products_of_warp().issued);
  });
}
inline void multiply_until(emulator::Warpgroup& group, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (group.products[i].done) continue;
    group.products[i].multiply();
    group.products[i].done = true;
    group.products[i].multiply = nullptr;
  }
}
template <int kPending>
void wgmma_wait_group() {
  emulator::together_warp("wgmma.wait", nullptr);
  emulator::Warpgroup& group = products();
  const auto& groups = products_of_warp().groups;
  const size_t count = groups.size() > kPending ? groups[groups.size() - 1 - kPending] : 0;
  const auto issued = [&group, count] {
    return count == 0 || group.products[count - 1].warps == 4;
  };
  if (!issued()) emulator::pause("wgmma.wait", issued);
  multiply_until(group, count);
}
template <int kCount>
void fence_operand(float (&)[kCount]) {}

/// Element k of row r of an operand of 32-byte rows, channels next to each other, through its
/// descriptor.
inline const char* operand(emulator::Block& where, uint64_t view, uint32_t row, uint32_t byte) {
  const uint32_t start = static_cast<uint32_t>(view & 0x3fff) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(view >> 32 & 0x3fff) << 4;
  if (view >> 62 != 1 || (view >> 49 & 7) != 0) throw emulator::Fault("not the 128-byte swizzle");
  const uint32_t linear = start + row / 8 * eight_rows + row % 8 * 128 + byte;
  const uint32_t address = linear ^ ((linear >> 7 & 7) << 4);
  if (address < kSharedBase || address - kSharedBase >= where.arena_bytes)
    throw emulator::Fault("wgmma outside shared memory");
  return where.arena + (address - kSharedBase);
}

struct GroupCall {
  float* d;
  uint64_t a, b;
  uint32_t accumulate;
};
template <class Element, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, uint32_t accumulate) {
  const auto call = std::make_shared<GroupCall>(GroupCall{d, a, b, accumulate});
  emulator::machine()->calls.push_back(call);  // other warps may come much later
  emulator::Warpgroup& group = products();
  emulator::Block* const where = &block();
  emulator::together_warp("wgmma", call.get(), [&](std::vector<void*>& lanes) {
    const size_t index = products_of_warp().issued++;
    if (index == group.products.size()) group.products.emplace_back();
    emulator::Warpgroup::Product& product = group.products[index];
    product.calls.resize(128);
    std::copy(lanes.begin(), lanes.end(), product.calls.begin() + self().thread % 128 / 32 * 32);
    if (++product.warps < 4) return;
    std::vector<GroupCall> calls;
    for (void* thread : product.calls) {
      calls.push_back(*static_cast<GroupCall*>(thread));
      if (calls.back().a != calls[0].a || calls.back().b != calls[0].b ||
          calls.back().accumulate != calls[0].accumulate)
        fail("threads of a warpgroup disagree about a product");
    }
    const auto multiply = [calls, where] {
      constexpr uint32_t kDepth = 32 / kSize<Element>;
      static float A[64][kDepth], B[kDepth][N], D[64][N];
      for (uint32_t k = 0; k < kDepth; k++) {
        for (uint32_t r = 0; r < 64; r++)
          A[r][k] = emulator::tensor_core_value<Element>(
              operand(*where, calls[0].a, r, k * kSize<Element>));
        for (uint32_t c = 0; c < N; c++)
          B[k][c] = emulator::tensor_core_value<Element>(
              operand(*where, calls[0].b, c, k * kSize<Element>));
      }
      // D fragment of wgmma.m64nN: thread t has rows 16 (t / 32) + t % 32 / 4 (+ 8), columns 8 j +
      // 2 (t % 4) (+ 1).
      const auto place = [](uint32_t t, uint32_t i, uint32_t& row, uint32_t& column) {
        row = t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8;
        column = i / 4 * 8 + t % 4 * 2 + i % 2;
      };
      for (uint32_t t = 0; t < 128; t++)
        for (uint32_t i = 0; i < N / 2; i++) {
          uint32_t row, column;
          place(t, i, row, column);
          D[row][column] = calls[0].accumulate ? calls[t].d[i] : 0.0f;
        }
      for (uint32_t r = 0; r < 64; r++)
        for (uint32_t k = 0; k < kDepth; k++)
          for (uint32_t c = 0; c < N; c++) D[r][c] += A[r][k] * B[k][c];
      for (uint32_t t = 0; t < 128; t++)
        for (uint32_t i = 0; i < N / 2; i++) {
          uint32_t row, column;
          place(t, i, row, column);
          calls[t].d[i] = D[row][column];
        }
    };
    product.multiply = multiply;
    if (!emulator::machine()->schedule.late) multiply_until(group, index + 1);
  });
}

}  // namespace zipfls::cuda::ptx
