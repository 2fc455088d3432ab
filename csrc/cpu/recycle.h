// Memory for large gradients, used again at the next step.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

namespace zipfls::cpu {

/// PyTorch's CPU allocator with a memory of one block: the one given back last serves the next
/// request of its size; any other request here frees it first. The price: the last large gradient's
/// memory stays with the process when its tensor is gone, as memory of smaller ones does in malloc.
///
/// malloc keeps what it frees for later up to 32 MiB a block. Beyond, a gradient of the same size
/// is mapped afresh at every step, and taking its pages from the system one by one, 4 KiB at a
/// time, can cost more than the arithmetic.
class Recycler final : public c10::Allocator {
 public:
  static constexpr size_t kLeast = size_t{32} << 20;  // bytes

  at::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = exchange(nullptr);
    if (block == nullptr || block->bytes != bytes) {
      block.reset();
      block = std::make_unique<Block>(Block{c10::GetCPUAllocator()->allocate(bytes), bytes});
      prefer_huge_pages(block->memory.get(), bytes);
    }
    void* const data = block->memory.get();
    return {data, block.release(), &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  /// The only one, never destroyed: tensors may outlive static objects.
  static Recycler& instance() {
    static auto* const recycler = new Recycler;
    return *recycler;
  }

 private:
  /// A hint, without effect where the system has no huge pages: fewer misses of the address cache.
  static void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{1} << 21;
    const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }

  struct Block {
    at::DataPtr memory;
    size_t bytes;
  };

  static void give_back(void* block) {
    instance().exchange(std::unique_ptr<Block>(static_cast<Block*>(block)));
  }

  /// Puts a block in the place of the kept one; frees nothing under the lock.
  std::unique_ptr<Block> exchange(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(kept_, std::move(block));
  }

  std::mutex mutex_;
  std::unique_ptr<Block> kept_;
};

/// at::empty for a gradient of logits, (N, C) in their type, or (0,) if none is wanted.
inline at::Tensor gradient_like(const at::Tensor& logits, bool wanted) {
  if (!wanted) return at::empty({0}, logits.options());
  if (logits.nbytes() < Recycler::kLeast) return at::empty(logits.sizes(), logits.options());
  at::Tensor grad = at::detail::empty_generic(logits.sizes(), &Recycler::instance(),
                                              c10::DispatchKeySet(c10::DispatchKey::CPU),
                                              logits.scalar_type(), std::nullopt);
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    grad.fill_(NAN);  // as at::empty does, so that what is left unwritten shows
  return grad;
}

}  // namespace zipfls::cpu
