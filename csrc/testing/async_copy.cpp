// cp.async: bytes move when their group is waited for, the latest moment that hardware may choose;
// until then the destination holds poison and reading it is a mistake. Products of a warpgroup read
// their factors as late.
#include <cstring>
#include <string>

#include "testing/scheduler.h"

namespace flexvar::emulation {

void cp_async(void* shared, const void* global, size_t bytes, bool valid, Location where) {
  const Site site{nullptr, where};
  if (!in_shared(shared) || reinterpret_cast<uintptr_t>(shared) % bytes != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0)) {
    fail("cp_async: the destination must be shared memory, both addresses aligned to " +
         std::to_string(bytes) + " bytes, " + to_string(where));
  }
  if (valid) check_read(global, bytes, site);
  check_write(shared, bytes, site);
  set_in_flight(shared, bytes);
  current->open_copies.push_back({shared, valid ? global : nullptr, bytes});
}

void cp_async_commit() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int pending_groups) {
  auto& groups = current->copy_groups;
  for (; groups.size() > static_cast<size_t>(pending_groups); groups.pop_front()) {
    for (const AsyncCopy& copy : groups.front()) {
      if (copy.global == nullptr) {
        std::memset(copy.shared, 0, copy.bytes);
      } else {
        std::memcpy(copy.shared, copy.global, copy.bytes);
      }
      mark_written(copy.shared, copy.bytes);
    }
  }
}

void begin_product(void (*run)(const void* context), const void* context, size_t bytes) {
  if (bytes > kProductBytes) fail("begin_product: its context is too large");
  current->open_products.push_back({run, {}});
  std::memcpy(current->open_products.back().context, context, bytes);
}

void commit_products() {
  current->product_groups.push_back(std::move(current->open_products));
  current->open_products.clear();
}

void wait_for_products(int pending_groups) {
  auto& groups = current->product_groups;
  for (; groups.size() > static_cast<size_t>(pending_groups); groups.pop_front()) {
    for (const Product& product : groups.front()) {
      const Product here = product;  // on the thread's stack, which kernels may read
      here.run(here.context);
    }
  }
}

}  // namespace flexvar::emulation
