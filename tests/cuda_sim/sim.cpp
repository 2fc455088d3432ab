// Fibers, barriers, the order of asynchronous operations, and the race check. Compiled without
// -fsanitize=thread in every build.
//
// Race check: the kernels' translation unit is compiled with -fsanitize=thread and linked without
// that sanitizer's library, so its calls at every load and store come here. Each byte of shared and
// of watched device memory remembers its last writer and readers. Two accesses are ordered by a
// barrier of the block (or cluster) that both have passed, or within a warp by __syncwarp; shuffles
// and ballots order nothing. What is not ordered and not both atomic is a race, whatever order the
// fibers happened to run in.
#include "sim.h"

#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
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

SimIndex threadIdx, blockIdx, blockDim, gridDim;

namespace sim {

Schedule schedule;
uint32_t most_blocks = 0;
std::vector<const void*> launched;

namespace {

std::string fault_text;
int fault_count = 0;
bool dead = false;  // the run cannot go on

// Fibers ------------------------------------------------------------------------------------------

constexpr size_t kStack = 256 * 1024, kPage = 4096;

struct Block;

struct Fiber : Thread {
  unsigned char* stack = nullptr;  // kStack bytes above one guard page
  void* stack_pointer = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  bool waits = false, done = true;
  const char* at = "";          // what it waits for
  std::function<bool()> ready;  // with `waits`: until then; empty: until it is released
};

/// Threads that must all call the same thing.
struct Collective {
  uint32_t size = 0, arrived = 0;
  int line = 0;
  const char* what = "";
  std::vector<void*> arguments;
  std::vector<Fiber*> waiting;
};

struct Warp : Collective {
  uint32_t clock = 0;  // __syncwarps passed
};

struct Block : BlockState {
  std::unique_ptr<unsigned char[]> memory, static_memory;
  std::vector<Warp> warps;
  std::vector<Collective> groups;
  Collective all, named[16];
  std::vector<Fiber*> fibers;
  uint32_t epoch = 0;  // barriers passed
};

std::vector<std::unique_ptr<Fiber>> pool;
std::vector<std::unique_ptr<Block>> cluster;
Collective cluster_collective;
uint32_t cluster_epoch = 0;
std::mt19937_64 noise;
std::deque<std::function<void()>> pending;  // TMA
std::vector<std::shared_ptr<void>> kept;
Fiber* current = nullptr;
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
  Fiber* const self = current;
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
  current->done = true;
  current->block->live--;
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
  fiber.index = thread;
  fiber.open.clear();
  fiber.groups.clear();
  fiber.stores.clear();
  fiber.ready = nullptr;
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
  current = &fiber;
  threadIdx.x = fiber.index;
  blockIdx.x = fiber.block->index;
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
  current = nullptr;
}

void wait() {
  current->waits = true;
  switch_to_scheduler(false);
}

unsigned char fresh_byte() {
  return schedule.fill == Schedule::kZeros  ? 0
         : schedule.fill == Schedule::kOnes ? 0xff
                                            : static_cast<unsigned char>(noise());
}

std::string name_of(const Fiber& fiber) {
  return "block " + std::to_string(fiber.block->index) + " thread " + std::to_string(fiber.index);
}

// Collectives -------------------------------------------------------------------------------------

Collective& collective(Scope scope, uint32_t& slot) {
  Block& block = *current->block;
  const uint32_t thread = current->index;
  switch (scope) {
    case kOfWarp:
      slot = thread % 32;
      return block.warps[thread / 32];
    case kOfWarpgroup:
      slot = thread % 128;
      return block.groups[thread / 128];
    case kOfBlock:
      slot = thread;
      return block.all;
    default:
      slot = block.rank * block.all.size + thread;
      return cluster_collective;
  }
}

void wake(Collective& all) {
  all.arrived = 0;
  for (Fiber* fiber : all.waiting) fiber->waits = false;
  all.waiting.clear();
}

void** join(Collective& all, uint32_t slot, const char* what, int line, void* argument) {
  if (all.arrived != 0 && (all.line != line || std::strcmp(all.what, what) != 0))
    fault(std::string(what) + " reached at line " + std::to_string(line) + " by " +
          name_of(*current) + " while others wait at line " + std::to_string(all.line) + " for " +
          all.what);
  all.line = line;
  all.what = what;
  all.arguments.resize(all.size);
  all.arguments[slot] = argument;
  if (++all.arrived == all.size) return all.arguments.data();
  all.waiting.push_back(current);
  current->at = what;
  wait();
  return nullptr;
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
  const Block& block = *current->block;
  const uint32_t warp = current->index / 32;
  return {launches,
          block.index,
          warp,
          block.epoch,
          cluster_epoch,
          block.warps[warp].clock,
          1u << current->index % 32};
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
        name_of(*current) + " and block " + std::to_string(other.block) + " warp " +
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
  if (current == nullptr) return;
  Region* const region = region_of(at);
  if (region == nullptr || region->shadow.empty()) return;
  const size_t first = static_cast<const unsigned char*>(at) - region->begin;
  const Reader now = here();
  for (size_t o = first; o < std::min(first + bytes, region->bytes); o++) {
    Byte& byte = region->shadow[o];
    if (!write && !byte.written) {
      fault("read of uninitialised byte " + std::to_string(o) + " of " + region->name + ": " +
            name_of(*current));
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

void fault(const std::string& text) {
  if (++fault_count <= 8) fault_text += text + "\n";
}

void fail(const std::string& text) {
  fault(text + (current != nullptr ? ": " + name_of(*current) : ""));
  dead = true;
  if (current == nullptr) throw std::runtime_error(text);
  current->done = true;
  switch_to_scheduler(false);
  std::abort();
}

void** arrive(Scope scope, const char* what, int line, void* argument) {
  uint32_t slot;
  Collective& all = collective(scope, slot);
  return join(all, slot, what, line, argument);
}

void release(Scope scope) {
  uint32_t slot;
  Collective& all = collective(scope, slot);
  if (scope == kOfWarp && std::strcmp(all.what, "__syncwarp") == 0)
    current->block->warps[current->index / 32].clock++;
  if (scope == kOfBlock) current->block->epoch++;
  if (scope == kOfCluster) {
    cluster_epoch++;
    for (auto& block : cluster) block->epoch++;
  }
  wake(all);
}

void named_barrier(int barrier, int threads, int line) {
  if (barrier < 1 || barrier > 15) fail("no such barrier");
  Collective& all = current->block->named[barrier];
  if (all.size == 0) all.size = static_cast<uint32_t>(threads);
  if (all.size != static_cast<uint32_t>(threads)) fail("threads disagree about a barrier's size");
  if (join(all, all.arrived, "bar.sync", line, nullptr) != nullptr) wake(all);
}

void wait_until(const char* what, const std::function<bool()>& ready) {
  if (ready()) return;
  current->at = what;
  current->ready = ready;
  wait();
  current->ready = nullptr;
}

Thread& thread() { return *current; }
BlockState& block() { return *current->block; }
BlockState& block_of_cluster(uint32_t rank) {
  if (rank >= cluster.size()) fail("no such block in the cluster");
  return *cluster[rank];
}
uint32_t cluster_blocks() { return static_cast<uint32_t>(cluster.size()); }
void complete_later(std::function<void()> complete) { pending.push_back(std::move(complete)); }
void keep(std::shared_ptr<void> object) { kept.push_back(std::move(object)); }

unsigned char* shared_memory() { return current->block->shared; }

void* static_shared(uint32_t bytes) {
  Block& block = *current->block;
  if (block.static_bytes == 0) {
    block.static_bytes = bytes;
    block.static_memory.reset(new unsigned char[bytes + 16]);
    for (uint32_t i = 0; i < bytes; i++) block.static_memory[i] = fresh_byte();
    block.static_shared = block.static_memory.get();
  }
  if (block.static_bytes != bytes) fail("one static array a kernel");
  return block.static_shared;
}

void guard(void* at, uint32_t bytes) { ASAN_POISON_MEMORY_REGION(at, bytes); }

double read_published(const double* at) { return *at; }

void launch(const std::function<void()>& kernel, uint32_t blocks, uint32_t threads,
            uint32_t cluster_size, uint32_t shared) {
  std::mt19937_64 random(schedule.seed);
  noise.seed(schedule.seed + 1);
  if (most_blocks != 0) blocks = std::min(blocks, most_blocks * cluster_size);
  blockDim.x = threads;
  gridDim.x = blocks;
  running_kernel = &kernel;
  launches++;
  dead = false;
  while (pool.size() < size_t{threads} * cluster_size) pool.push_back(std::make_unique<Fiber>());

  std::vector<uint32_t> order(blocks / cluster_size);
  for (uint32_t i = 0; i < order.size(); i++) order[i] = i;
  if (schedule.order == Schedule::kDescending) std::reverse(order.begin(), order.end());
  if (schedule.order >= Schedule::kRandom) std::shuffle(order.begin(), order.end(), random);

  for (const uint32_t group : order) {
    if (dead) break;
    cluster.clear();
    cluster_collective = {};
    cluster_collective.size = cluster_size * threads;
    shared_regions.clear();
    std::vector<Fiber*> fibers;
    for (uint32_t rank = 0; rank < cluster_size; rank++) {
      cluster.push_back(std::make_unique<Block>());
      Block& block = *cluster.back();
      block.rank = rank;
      block.index = group * cluster_size + rank;
      block.live = block.all.size = threads;
      block.memory.reset(new unsigned char[shared + 1]);  // 16-byte aligned
      for (uint32_t i = 0; i < shared; i++) block.memory[i] = fresh_byte();
      block.shared = block.memory.get();
      block.shared_bytes = shared;
      ASAN_POISON_MEMORY_REGION(block.shared + shared, 1);
      shared_regions.push_back({block.shared, shared, "shared memory", {}});
#if defined(SIM_RACES)
      shared_regions.back().shadow.resize(shared);
#endif
      block.warps.resize((threads + 31) / 32);
      for (Warp& warp : block.warps) warp.size = 32;
      block.groups.resize((threads + 127) / 128);
      for (Collective& warpgroup : block.groups) warpgroup.size = 128;
      block.warpgroups.resize(block.groups.size());
      block.stores.resize(block.warps.size());
      for (uint32_t t = 0; t < threads; t++) {
        Fiber& fiber = *pool[rank * threads + t];
        prepare(fiber, &block, t);
        block.fibers.push_back(&fiber);
        fibers.push_back(&fiber);
      }
    }
    if (schedule.order == Schedule::kDescending) std::reverse(fibers.begin(), fibers.end());
    const bool lazy_warps = schedule.order == Schedule::kLazyWarps;
    std::vector<size_t> warps(fibers.size() / 32);
    for (size_t i = 0; i < warps.size(); i++) warps[i] = i;
    std::vector<char> lazy(warps.size(), 0);
    const std::vector<Fiber*> in_order = fibers;
    size_t rounds = 0;
    for (bool left = true; left && !dead;) {
      if (schedule.order == Schedule::kRandom) std::shuffle(fibers.begin(), fibers.end(), random);
      if (schedule.order >= Schedule::kRandomByWarp) {
        std::shuffle(warps.begin(), warps.end(), random);
        for (size_t i = 0; i < fibers.size(); i++)
          fibers[i] = in_order[warps[i / 32] * 32 + i % 32];
        if (lazy_warps && rounds++ % 256 == 0)
          for (char& is : lazy) is = random() % 4 == 0;
      }
      bool moved = false, ready = false;
      left = false;
      for (size_t i = 0; i < fibers.size() && !dead; i++) {
        // Some warps fall far behind the others, as far as barriers let them.
        if (lazy_warps && i % 32 == 0 &&
            (lazy[warps[i / 32]] ? random() % 64 != 0 : random() % 4 == 0)) {
          for (size_t k = i; k < i + 32; k++) {
            left |= !fibers[k]->done;
            ready |=
                !fibers[k]->done && (!fibers[k]->waits || (fibers[k]->ready && fibers[k]->ready()));
          }
          i += 31;
          continue;
        }
        Fiber& fiber = *fibers[i];
        if (fiber.done) continue;
        left = true;
        if (fiber.waits && fiber.ready && fiber.ready()) fiber.waits = false;
        if (fiber.waits) continue;
        run(fiber);
        moved = true;
      }
      if (dead) break;
      if (!pending.empty() && (!(moved || ready) || (lazy_warps && random() % 8 == 0))) {
        // Copies of TMA complete in any order.
        const size_t which = schedule.order == Schedule::kAscending ? 0 : random() % pending.size();
        const auto complete = pending[which];
        pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(which));
        try {
          complete();
        } catch (const std::runtime_error&) {
        }
      } else if (left && !moved && !ready) {
        std::string where;
        for (const Fiber* fiber : in_order)
          if (!fiber->done && (where.empty() || fiber->index % 32 == 0) && where.size() < 400)
            where += " [" + name_of(*fiber) + " at " + fiber->at + "]";
        fault("deadlock: threads wait for others that have left or wait elsewhere:" + where);
        dead = true;  // the fibers' stacks are used afresh by the next launch
      }
    }
    for (auto& block : cluster) {
      for (const auto& stores : block->stores)
        for (const auto& store : stores) store();
      for (const Fiber* fiber : block->fibers)
        for (const auto& store : fiber->stores) store();
      ASAN_UNPOISON_MEMORY_REGION(block->shared, shared + 1);
    }
    if (!dead && !pending.empty()) fault("copies outlive the kernel");
    pending.clear();
    kept.clear();
    shared_regions.clear();
  }
  schedule.seed++;
}

void watch(const void* at, size_t bytes, bool written, const char* name) {
  (void)written;
  regions.push_back({static_cast<const unsigned char*>(at), bytes, name, {}});
#if defined(SIM_RACES)
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
#if defined(SIM_RACES)
  check(at, 4, true, true);
#endif
  const int32_t before = *at;
  *at += x;
  return before;
}

int32_t atomic_cas(int32_t* at, int32_t expected, int32_t x) {
#if defined(SIM_RACES)
  check(at, 4, true, true);
#endif
  const int32_t before = *at;
  if (before == expected) *at = x;
  return before;
}

}  // namespace sim

#if defined(SIM_RACES)
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
