#include "testing/order.h"

#include <algorithm>

#include "testing/scheduler.h"

namespace flexvar::emulation {

namespace {

std::map<const void*, BlockClocks> left_by_atomics;

void merge(Clocks& into, const Clocks& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void merge(BlockClocks& into, const BlockClocks& from) {
  for (const auto& [number, clocks] : from) {
    auto& known = into[number];
    if (known == nullptr) {
      known = clocks;
    } else if (known != clocks) {
      Clocks merged = *known;
      merge(merged, *clocks);
      known = std::make_shared<const Clocks>(std::move(merged));
    }
  }
}

std::shared_ptr<const BlockClocks> merged(const std::shared_ptr<const BlockClocks>& a,
                                          const std::shared_ptr<const BlockClocks>& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  BlockClocks result = *a;
  merge(result, *b);
  return std::make_shared<const BlockClocks>(std::move(result));
}

}  // namespace

bool happened_before(Epoch epoch) {
  if (epoch.block() < block.first_number) {
    return !block.overlaps || current->waited_for_earlier_launches;
  }
  const Knowledge& knows = current->knows;
  if (epoch.block() == block.number) return (*knows.own_block)[epoch.thread()] >= epoch.clock();
  if (knows.other_blocks == nullptr) return false;
  const auto found = knows.other_blocks->find(epoch.block());
  return found != knows.other_blocks->end() && (*found->second)[epoch.thread()] >= epoch.clock();
}

void meet(const std::vector<Fiber*>& fibers, const std::vector<Knowledge>& left) {
  Knowledge joint = fibers.front()->knows;
  auto clocks = std::make_shared<Clocks>(*joint.own_block);
  const Clocks* last_merged = joint.own_block.get();
  const auto learn = [&](const Knowledge& knows) {
    if (knows.own_block.get() != last_merged) {
      last_merged = knows.own_block.get();
      merge(*clocks, *last_merged);
    }
    joint.other_blocks = merged(joint.other_blocks, knows.other_blocks);
    joint.pending = merged(joint.pending, knows.pending);
  };
  for (const Fiber* fiber : fibers) learn(fiber->knows);
  for (const Knowledge& knows : left) learn(knows);
  for (const Fiber* fiber : fibers) (*clocks)[fiber->id] = fiber->clock;
  joint.own_block = std::move(clocks);
  for (Fiber* fiber : fibers) {
    fiber->knows = joint;
    ++fiber->clock;
  }
}

Knowledge publish(Fiber& fiber) {
  Knowledge published = fiber.knows;
  auto clocks = std::make_shared<Clocks>(*published.own_block);
  (*clocks)[fiber.id] = fiber.clock++;
  published.own_block = std::move(clocks);
  return published;
}

void wait_for_earlier_launches() { current->waited_for_earlier_launches = true; }

void thread_fence() {
  Fiber& fiber = *current;
  fiber.fenced_clock = fiber.clock;
  fiber.knows.own_block = fiber.fenced = publish(fiber).own_block;
  if (fiber.knows.pending == nullptr) return;
  BlockClocks others = *fiber.knows.pending;
  if (const auto own = others.find(block.number); own != others.end()) {
    Clocks clocks = *fiber.knows.own_block;
    merge(clocks, *own->second);
    fiber.knows.own_block = std::make_shared<const Clocks>(std::move(clocks));
    others.erase(own);
  }
  fiber.knows.other_blocks =
      merged(fiber.knows.other_blocks, std::make_shared<const BlockClocks>(std::move(others)));
  fiber.knows.pending = nullptr;
}

void order_by_atomic(const void* address) {
  Fiber& fiber = *current;
  BlockClocks& left = left_by_atomics[address];
  if (!left.empty()) {
    fiber.knows.pending = merged(fiber.knows.pending, std::make_shared<const BlockClocks>(left));
  }
  // Visible to others is what this thread's fence covered, and what threads that it met since had
  // fenced themselves.
  Clocks visible(block.fibers.size(), 0);
  if (fiber.fenced != nullptr) visible = *fiber.fenced;
  bool anything = fiber.fenced != nullptr;
  for (const Fiber& other : block.fibers) {
    const uint32_t fenced = std::min((*fiber.knows.own_block)[other.id], other.fenced_clock);
    visible[other.id] = std::max(visible[other.id], fenced);
    anything = anything || fenced != 0;
  }
  if (!anything) return;
  BlockClocks leaves{{block.number, std::make_shared<const Clocks>(std::move(visible))}};
  if (fiber.knows.other_blocks != nullptr) merge(leaves, *fiber.knows.other_blocks);
  merge(left, leaves);
}

void forget_atomics() { left_by_atomics.clear(); }

}  // namespace flexvar::emulation
