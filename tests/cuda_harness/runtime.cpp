// Fibers, barriers and the race check. Compiled without -fsanitize=thread in every build.
//
// Race check: the kernels' translation unit is compiled with -fsanitize=thread and linked without
// that sanitizer's library, so its calls at every load and store come here. Each byte of shared and
// of watched device memory remembers its last writer and readers. Two accesses are ordered by a
// barrier of the block (or cluster) that both have passed, or within a warp by __syncwarp; shuffles
// and ballots order nothing. What is not ordered and not both atomic is a race, whatever order the
// fibers happened to run in.
#include "runtime.h"

#include "cuda_on_cpu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sim {

Index thread_index, block_index, block_size, grid_size;

namespace {

std::string fault_text;
int fault_count = 0;

void fault(const std::string& text) {
  if (++fault_count <= 8) fault_text += text + "\n";
}

// Fibers ------------------------------------------------------------------------------------------

constexpr size_t kStack = 256 * 1024, kPage = 4096;

struct Block;

struct Fiber {
  unsigned char* stack = nullptr;  // kStack bytes above one guard page
  void* stack_pointer = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  uint32_t thread = 0;
  bool waits = false, done = true;
};

struct Warp {
  uint32_t arrived = 0, mask = 0;
  int kind = 0, line = 0;
  unsigned char values[32][16], results[32][16];
  uint32_t ballot = 0, ballot_result = 0;
  uint32_t clock = 0;  // __syncwarps passed
};

struct Barrier {
  uint32_t arrived = 0;
  int line = 0;
  bool any = false, any_result = false;
};

struct Block {
  uint32_t index = 0, rank = 0;
  std::unique_ptr<unsigned char[]> memory;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  Barrier barrier;
  uint32_t epoch = 0;  // barriers passed
};

std::vector<std::unique_ptr<Fiber>> pool;
std::vector<Block> cluster;
Barrier cluster_barrier;
uint32_t cluster_epoch = 0, shared_bytes = 0;
Fiber* running = nullptr;
const std::function<void()>* running_kernel = nullptr;
void* scheduler_pointer = nullptr;
[[maybe_unused]] void* scheduler_fake_stack = nullptr;  // these three: AddressSanitizer's
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;

#if defined(__x86_64__)
// Saves the callee's registers on the current stack, its pointer in *save, and goes on with the
// other's.
extern "C" void zipfls_switch(void** save, void* load);
asm(R"(
.text
.globl zipfls_switch
.type zipfls_switch, @function
zipfls_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size zipfls_switch, .-zipfls_switch
)");
#else
ucontext_t scheduler_context;
#endif

void switch_to_scheduler(bool last) {
  Fiber* const self = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &self->fake_stack, scheduler_bottom,
                                 scheduler_size);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  zipfls_switch(&self->stack_pointer, scheduler_pointer);
#else
  swapcontext(&self->context, &scheduler_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

extern "C" void zipfls_fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  (*running_kernel)();
  running->done = true;
  switch_to_scheduler(true);
  std::abort();
}

void prepare(Fiber& fiber, Block* block, uint32_t thread) {
  if (fiber.stack == nullptr) {
    void* const memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
      std::perror("stack of a fiber");
      std::abort();
    }
    fiber.stack = static_cast<unsigned char*>(memory) + kPage;
  }
  fiber.block = block;
  fiber.thread = thread;
  fiber.waits = fiber.done = false;
  fiber.fake_stack = nullptr;
#if defined(__x86_64__)
  // As if the fiber had just called zipfls_switch from the first instruction of zipfls_fiber_main.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 1;  // 8 past 16 bytes at entry
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&zipfls_fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &zipfls_fiber_main, 0);
#endif
}

void run(Fiber& fiber) {
  running = &fiber;
  thread_index.x = fiber.thread;
  block_index.x = fiber.block->index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStack);
#endif
#if defined(__x86_64__)
  zipfls_switch(&scheduler_pointer, fiber.stack_pointer);
#else
  swapcontext(&scheduler_context, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void wait() {
  running->waits = true;
  switch_to_scheduler(false);
}

std::string who(const Fiber& fiber) {
  return "block " + std::to_string(fiber.block->index) + " thread " + std::to_string(fiber.thread);
}

// Barriers and collectives ------------------------------------------------------------------------

/// Arrives; the last of `expected` wakes all of `fibers`. Returns whether this was the last.
bool arrive(Barrier& barrier, bool x, int line, size_t expected, const char* what) {
  if (barrier.arrived != 0 && barrier.line != line)
    fault(std::string(what) + " reached at line " + std::to_string(line) + " by " + who(*running) +
          " while others wait at line " + std::to_string(barrier.line));
  barrier.line = line;
  barrier.any |= x;
  if (++barrier.arrived < expected) return false;
  barrier.any_result = barrier.any;
  barrier.any = false;
  barrier.arrived = 0;
  return true;
}

enum Kind { kSyncWarp = 1, kBallot, kExchange };

/// A warp's collective: returns when all lanes of the mask have come to it.
Warp& meet(uint32_t mask, Kind kind, int line) {
  Block& block = *running->block;
  Warp& warp = block.warps[running->thread / 32];
  const uint32_t lane = running->thread % 32;
  if ((mask >> lane & 1) == 0)
    fault("a collective's mask leaves out the lane that calls it: " + who(*running));
  if (warp.arrived != 0 && (warp.kind != kind || warp.line != line || warp.mask != mask))
    fault("lanes of a warp meet at different collectives, lines " + std::to_string(line) + " and " +
          std::to_string(warp.line) + ": " + who(*running));
  warp.kind = kind;
  warp.line = line;
  warp.mask = mask;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    wait();
    return warp;
  }
  warp.arrived = 0;
  std::memcpy(warp.results, warp.values, sizeof warp.results);
  warp.ballot_result = warp.ballot;
  warp.ballot = 0;
  if (kind == kSyncWarp) warp.clock++;
  for (uint32_t l = 0; l < 32; l++)
    if (mask >> l & 1) block.fibers[running->thread / 32 * 32 + l]->waits = false;
  return warp;
}

// The race check ----------------------------------------------------------------------------------

struct Reader {
  uint32_t launch = 0, block = 0, warp = 0, epoch = 0, cluster_epoch = 0, clock = 0, lanes = 0;
};

struct Byte {
  Reader writer;  // lanes: one bit
  Reader readers[2];
  bool written = false, atomic = false;
};

struct Region {
  const unsigned char* begin;
  size_t bytes;
  std::string name;
  std::vector<Byte> shadow;
};

std::vector<Region> regions;  // watched device memory
std::vector<Region> shared_regions;
uint32_t launches = 0;

Reader here() {
  const Block& block = *running->block;
  const uint32_t warp = running->thread / 32;
  return {launches,
          block.index,
          warp,
          block.epoch,
          cluster_epoch,
          block.warps[warp].clock,
          1u << running->thread % 32};
}

/// Whether what `before` did happened before what `now` does. lanes_matter: apart from now's own
/// lane.
bool ordered(const Reader& before, const Reader& now) {
  if (before.launch != now.launch) return true;
  if (before.block != now.block) {
    // Blocks of a cluster are ordered by its barrier; others by nothing.
    return cluster.size() > 1 && before.block / cluster.size() == now.block / cluster.size() &&
           before.cluster_epoch < now.cluster_epoch;
  }
  if (before.epoch < now.epoch) return true;
  if (before.warp != now.warp) return false;
  return before.clock < now.clock || (before.lanes & ~now.lanes) == 0;
}

[[maybe_unused]] void race(const char* what, const Region& region, size_t offset,
                           const Reader& other) {
  fault(std::string(what) + " at byte " + std::to_string(offset) + " of " + region.name + ": " +
        who(*running) + " and block " + std::to_string(other.block) + " warp " +
        std::to_string(other.warp));
}

Region* region_of(const void* at) {
  const auto* p = static_cast<const unsigned char*>(at);
  for (auto* list : {&shared_regions, &regions})
    for (auto& region : *list)
      if (p >= region.begin && p < region.begin + region.bytes) return &region;
  return nullptr;
}

[[maybe_unused]] void check(const void* at, size_t bytes, bool write, bool atomic) {
  if (running == nullptr) return;
  Region* const region = region_of(at);
  if (region == nullptr || region->shadow.empty()) return;
  const size_t first = static_cast<const unsigned char*>(at) - region->begin;
  const Reader now = here();
  for (size_t o = first; o < std::min(first + bytes, region->bytes); o++) {
    Byte& byte = region->shadow[o];
    if (!write && !byte.written) {
      fault("read of uninitialised byte " + std::to_string(o) + " of " + region->name + ": " +
            who(*running));
      byte.written = true;
    }
    if (byte.writer.lanes != 0 && !(atomic && byte.atomic) && !ordered(byte.writer, now)) {
      race(write ? "two writes without a barrier between"
                 : "read and write without a barrier between",
           *region, o, byte.writer);
      return;
    }
    if (write) {
      if (atomic && !byte.written) fault("atomic on uninitialised memory of " + region->name);
      for (const Reader& reader : byte.readers)
        if (reader.lanes != 0 && !ordered(reader, now)) {
          race("write and read without a barrier between", *region, o, reader);
          return;
        }
      byte.writer = now;
      byte.atomic = atomic;
      byte.written = true;
    } else {
      // A record for each of two warps: one for the reader's own, with all its lanes of this
      // moment.
      Reader* slot = nullptr;
      for (Reader& reader : byte.readers)
        if (reader.lanes != 0 && reader.block == now.block && reader.warp == now.warp)
          slot = &reader;
      if (slot == nullptr)
        slot = ordered(byte.readers[0], now) ? &byte.readers[0] : &byte.readers[1];
      const bool same = slot->launch == now.launch && slot->block == now.block &&
                        slot->warp == now.warp && slot->epoch == now.epoch &&
                        slot->clock == now.clock;
      const uint32_t lanes = same ? slot->lanes | now.lanes : now.lanes;
      *slot = now;
      slot->lanes = lanes;
    }
  }
}

}  // namespace

unsigned char* shared_memory() { return running->block->memory.get(); }

void guard(void* at, uint32_t bytes) { ASAN_POISON_MEMORY_REGION(at, bytes); }

bool sync_threads_or(bool x, int line) {
  Block& block = *running->block;
  if (!arrive(block.barrier, x, line, block.fibers.size(), "__syncthreads")) {
    wait();
    return block.barrier.any_result;
  }
  block.epoch++;
  for (Fiber* fiber : block.fibers) fiber->waits = false;
  return block.barrier.any_result;
}

void sync_threads(int line) { sync_threads_or(false, line); }

void sync_warp(uint32_t mask, int line) { meet(mask, kSyncWarp, line); }

uint32_t ballot(uint32_t mask, bool x, int line) {
  Warp& warp = running->block->warps[running->thread / 32];
  if (x) warp.ballot |= 1u << running->thread % 32;
  return meet(mask, kBallot, line).ballot_result;
}

void exchange(uint32_t mask, void* value, int bytes, int from_lane, int line) {
  Warp& warp = running->block->warps[running->thread / 32];
  std::memcpy(warp.values[running->thread % 32], value, bytes);
  if ((mask >> from_lane & 1) == 0)
    fault("a shuffle from a lane outside its mask: " + who(*running));
  meet(mask, kExchange, line);
  std::memcpy(value, warp.results[from_lane], bytes);
}

uint32_t cluster_size() { return static_cast<uint32_t>(cluster.size()); }
uint32_t cluster_rank() { return running->block->rank; }

void cluster_sync() {
  if (!arrive(cluster_barrier, false, 0, cluster.size() * block_size.x, "cluster_sync")) {
    wait();
    return;
  }
  cluster_epoch++;
  for (Block& block : cluster) {
    block.epoch++;
    for (Fiber* fiber : block.fibers) fiber->waits = false;
  }
}

void* cluster_map(void* mine, uint32_t rank) {
  return cluster[rank].memory.get() +
         (static_cast<unsigned char*>(mine) - running->block->memory.get());
}

double read_published(const double* at) { return *at; }

void launch(const std::function<void()>& kernel, uint32_t blocks, uint32_t threads,
            uint32_t cluster_blocks, uint32_t shared, const Schedule& schedule) {
  std::mt19937_64 random(schedule.seed);
  block_size.x = threads;
  grid_size.x = blocks;
  running_kernel = &kernel;
  shared_bytes = shared;
  launches++;
  while (pool.size() < size_t{threads} * cluster_blocks) pool.push_back(std::make_unique<Fiber>());

  std::vector<uint32_t> order(blocks / cluster_blocks);
  for (uint32_t i = 0; i < order.size(); i++) order[i] = i;
  if (schedule.order == Schedule::kDescending) std::reverse(order.begin(), order.end());
  if (schedule.order >= Schedule::kRandom) std::shuffle(order.begin(), order.end(), random);

  for (const uint32_t group : order) {
    cluster = std::vector<Block>(cluster_blocks);
    cluster_barrier = {};
    shared_regions.clear();
    std::vector<Fiber*> fibers;
    for (uint32_t rank = 0; rank < cluster_blocks; rank++) {
      Block& block = cluster[rank];
      block.rank = rank;
      block.index = group * cluster_blocks + rank;
      block.memory.reset(new unsigned char[shared + 1]);  // 16-byte aligned
      for (uint32_t i = 0; i < shared; i++)
        block.memory[i] = schedule.fill == Schedule::kZeros  ? 0
                          : schedule.fill == Schedule::kOnes ? 0xff
                                                             : random();
      ASAN_POISON_MEMORY_REGION(block.memory.get() + shared, 1);
      shared_regions.push_back({block.memory.get(), shared, "shared memory", {}});
#if defined(HARNESS_RACES)
      shared_regions.back().shadow.resize(shared);
#endif
      block.warps.resize((threads + 31) / 32);
      for (uint32_t t = 0; t < threads; t++) {
        Fiber& fiber = *pool[rank * threads + t];
        prepare(fiber, &block, t);
        block.fibers.push_back(&fiber);
        fibers.push_back(&fiber);
      }
    }
    if (schedule.order == Schedule::kDescending) std::reverse(fibers.begin(), fibers.end());
    for (bool left = true; left;) {
      if (schedule.order == Schedule::kRandom) std::shuffle(fibers.begin(), fibers.end(), random);
      if (schedule.order == Schedule::kRandomByWarp) {
        std::vector<std::pair<uint64_t, Fiber*>> keyed;
        const uint64_t salt = random();
        for (Fiber* f : fibers)
          keyed.push_back({(f->block->rank * 64 + f->thread / 32) * 0x9e3779b97f4a7c15u ^ salt, f});
        std::stable_sort(keyed.begin(), keyed.end(),
                         [](auto& a, auto& b) { return a.first < b.first; });
        for (size_t i = 0; i < fibers.size(); i++) fibers[i] = keyed[i].second;
      }
      bool moved = false;
      left = false;
      for (Fiber* fiber : fibers) {
        if (fiber->done) continue;
        left = true;
        if (fiber->waits) continue;
        run(*fiber);
        moved = true;
      }
      if (left && !moved) {
        const Fiber* stuck =
            *std::find_if(fibers.begin(), fibers.end(), [](Fiber* f) { return !f->done; });
        fault("deadlock: " + who(*stuck) + " waits for threads that have left or wait elsewhere");
        break;  // their stacks are used afresh by the next launch
      }
    }
    for (Block& block : cluster) ASAN_UNPOISON_MEMORY_REGION(block.memory.get(), shared + 1);
    shared_regions.clear();
  }
}

void watch(const void* at, size_t bytes, bool written, const char* name) {
  (void)written;
  regions.push_back({static_cast<const unsigned char*>(at), bytes, name, {}});
#if defined(HARNESS_RACES)
  regions.back().shadow.resize(bytes);
  for (Byte& byte : regions.back().shadow) byte.written = written;
#endif
}

void forget_watched() { regions.clear(); }

std::string faults() {
  std::string text = fault_text;
  if (fault_count > 8) text += "and " + std::to_string(fault_count - 8) + " more\n";
  fault_text.clear();
  fault_count = 0;
  return text;
}

int32_t atomic_add(int32_t* at, int32_t x) {
#if defined(HARNESS_RACES)
  check(at, 4, true, true);
#endif
  const int32_t before = *at;
  *at += x;
  return before;
}

int32_t atomic_cas(int32_t* at, int32_t expected, int32_t x) {
#if defined(HARNESS_RACES)
  check(at, 4, true, true);
#endif
  const int32_t before = *at;
  if (before == expected) *at = x;
  return before;
}

}  // namespace sim

#if defined(HARNESS_RACES)
// What -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
#define ZIPFLS_ACCESS(n)                                                       \
  void __tsan_read##n(void* at) { sim::check(at, n, false, false); }           \
  void __tsan_write##n(void* at) { sim::check(at, n, true, false); }           \
  void __tsan_unaligned_read##n(void* at) { sim::check(at, n, false, false); } \
  void __tsan_unaligned_write##n(void* at) { sim::check(at, n, true, false); }
ZIPFLS_ACCESS(1)
ZIPFLS_ACCESS(2)
ZIPFLS_ACCESS(4)
ZIPFLS_ACCESS(8)
ZIPFLS_ACCESS(16)
void __tsan_read_range(void* at, size_t bytes) { sim::check(at, bytes, false, false); }
void __tsan_write_range(void* at, size_t bytes) { sim::check(at, bytes, true, false); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
