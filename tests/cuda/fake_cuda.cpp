// What torch asks of CUDA before it lets a tensor say that it lies there: a device guard, streams, hooks, pinned memory.
// A build of torch for CPUs has none of it, and aborts as soon as a tensor on CUDA needs a gradient; a build for CUDA
// asks for a driver. Nothing here moves data: fake_cuda.py computes on the CPU.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device the_device(CUDA, 0);
const c10::Stream the_stream(c10::Stream::DEFAULT, the_device);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return the_device; }
  c10::Device getDevice() const override { return the_device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return the_stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return the_stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return the_stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
} guard;

std::mutex blocks_mutex;
std::map<const char*, size_t> pinned_blocks;

void release(void* block) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  pinned_blocks.erase(static_cast<const char*>(block));
  std::free(block);
}

// Ordinary memory that remembers that it was asked for as pinned.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    const size_t rounded = (num_bytes / 64 + 1) * 64;
    void* block = std::aligned_alloc(64, rounded);
    std::lock_guard<std::mutex> lock(blocks_mutex);
    pinned_blocks[static_cast<const char*>(block)] = rounded;
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { default_copy_data(to, from, num_bytes); }
} pinned_allocator;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  void init() const override {}
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto after = pinned_blocks.upper_bound(static_cast<const char*>(data));
    if (after == pinned_blocks.begin()) return false;
    const auto& [start, num_bytes] = *std::prev(after);
    return static_cast<const char*>(data) < start + num_bytes;
  }
};

}  // namespace

namespace at {
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks)
}  // namespace at

extern "C" void install_guard() { c10::impl::device_guard_impl_registry[static_cast<size_t>(CUDA)].store(&guard); }
