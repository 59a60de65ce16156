// Operations of a warp: lanes wait until all that the mask names have arrived; the last one
// computes for all.
#include <algorithm>
#include <bit>
#include <string>

#include "testing/matrix.h"
#include "testing/scheduler.h"

namespace flexvar::emulation {

namespace {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::sync:
      return "__syncwarp";
    case WarpOp::shuffle:
      return "__shfl_sync";
    case WarpOp::ballot:
      return "__ballot_sync";
    case WarpOp::vote_all:
      return "__all_sync";
    case WarpOp::vote_any:
      return "__any_sync";
    case WarpOp::match_any:
      return "__match_any_sync";
    case WarpOp::match_all:
      return "__match_all_sync";
    case WarpOp::add:
      return "__reduce_add_sync";
    case WarpOp::min:
    case WarpOp::min_signed:
      return "__reduce_min_sync";
    case WarpOp::max:
    case WarpOp::max_signed:
      return "__reduce_max_sync";
    case WarpOp::bit_and:
      return "__reduce_and_sync";
    case WarpOp::bit_or:
      return "__reduce_or_sync";
    case WarpOp::bit_xor:
      return "__reduce_xor_sync";
    case WarpOp::matrix_load:
      return "ldmatrix";
    case WarpOp::matrix_product:
      return "mma";
  }
  __builtin_unreachable();
}

template <class Visit>
void for_each_lane(unsigned mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(std::countr_zero(mask));
}

uint32_t reduce(const WarpGroup& group) {
  uint32_t total = static_cast<uint32_t>(group.lanes[std::countr_zero(group.mask)]->value);
  for_each_lane(group.mask & (group.mask - 1), [&](int lane) {
    const auto value = static_cast<uint32_t>(group.lanes[lane]->value);
    const auto a = static_cast<int32_t>(total), b = static_cast<int32_t>(value);
    switch (group.op) {
      case WarpOp::add:
        total += value;
        break;
      case WarpOp::min:
        total = std::min(total, value);
        break;
      case WarpOp::max:
        total = std::max(total, value);
        break;
      case WarpOp::min_signed:
        total = static_cast<uint32_t>(std::min(a, b));
        break;
      case WarpOp::max_signed:
        total = static_cast<uint32_t>(std::max(a, b));
        break;
      case WarpOp::bit_and:
        total &= value;
        break;
      case WarpOp::bit_or:
        total |= value;
        break;
      default:
        total ^= value;
    }
  });
  return total;
}

unsigned lanes_with_value(const WarpGroup& group, uint64_t value) {
  unsigned lanes = 0;
  for_each_lane(group.mask, [&](int lane) {
    if (group.lanes[lane]->value == value) lanes |= 1u << lane;
  });
  return lanes;
}

void complete(const WarpGroup& group, unsigned warp) {
  switch (group.op) {
    case WarpOp::sync: {
      std::vector<Fiber*> fibers;
      for_each_lane(group.mask,
                    [&](int lane) { fibers.push_back(&block.fibers[warp * 32 + lane]); });
      meet(fibers, {});
      return;
    }
    case WarpOp::matrix_load:
      return complete_matrix_load(group, warp);
    case WarpOp::matrix_product:
      return complete_matrix_product(group);
    default:
      break;
  }
  for_each_lane(group.mask, [&](int lane) {
    WarpArguments& arguments = *group.lanes[lane];
    switch (group.op) {
      case WarpOp::shuffle:
        if ((group.mask >> arguments.source_lane & 1) == 0) {
          fail("__shfl_sync: lane " + std::to_string(lane) + " reads lane " +
               std::to_string(arguments.source_lane) + ", which takes no part, " +
               to_string(group.where));
        }
        arguments.result = group.lanes[arguments.source_lane]->value;
        break;
      case WarpOp::ballot:
        arguments.result = lanes_with_value(group, 1);
        break;
      case WarpOp::vote_all:
        arguments.result = lanes_with_value(group, 1) == group.mask;
        break;
      case WarpOp::vote_any:
        arguments.result = lanes_with_value(group, 1) != 0;
        break;
      case WarpOp::match_any:
        arguments.result = lanes_with_value(group, arguments.value);
        break;
      case WarpOp::match_all:
        arguments.result = lanes_with_value(group, arguments.value) == group.mask ? group.mask : 0;
        break;
      default:
        arguments.result = reduce(group);
    }
  });
}

}  // namespace

int current_lane() { return static_cast<int>(current->id % 32); }

void warp_collective(WarpOp op, unsigned mask, WarpArguments& arguments, Location where) {
  const unsigned warp = current->id / 32, lane = current->id % 32, bit = 1u << lane;
  const auto lanes = std::min<size_t>(32, block.fibers.size() - warp * 32);
  if ((mask & bit) == 0 || (lanes < 32 && mask >> lanes != 0)) {
    fail(std::string(name_of(op)) +
         ": the mask must name the calling lane and only lanes that exist, " + to_string(where));
  }
  auto& groups = block.warps[warp];
  auto group = std::find_if(groups.begin(), groups.end(),
                            [&](const WarpGroup& g) { return g.mask == mask; });
  if (group == groups.end()) group = groups.insert(group, {op, mask, 0, where, {}});
  if (group->op != op || !same_place(group->where, where)) {
    fail(std::string("divergent warp: this lane is at ") + name_of(op) + ", " + to_string(where) +
         ", another at " + name_of(group->op) + ", " + to_string(group->where));
  }
  group->arrived |= bit;
  group->lanes[lane] = &arguments;
  if (group->arrived != mask) return wait(name_of(op), mask, where);

  const WarpGroup complete_group = *group;
  groups.erase(group);
  complete(complete_group, warp);
  for_each_lane(mask & ~bit, [&](int other) { make_runnable(block.fibers[warp * 32 + other]); });
}

}  // namespace flexvar::emulation
