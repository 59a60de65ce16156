// The weight of a block in panels, packed while the tile unit multiplies: what is loaded, split and
// stored then takes hardly any time of its own.
//
// A panel is 32 columns of the output (rows of the weight) and a few steps of 32 of the depth: for
// each step, each half of the columns one tile a part. Where all rows of x are one product, packing
// takes as long as it does. Then panels follow one another down the depth, and a step is packed
// into the place that another has just left: runs in memory are long, and it all stays in the L1
// cache. Otherwise a panel meets all rows of x, while the next is packed beside it, and columns
// come before the depth, so that the rows of x stay in the L2 cache.
#pragma once

#include "common/cpu_amx.h"
#include "common/divide_up.h"
#include "linear/cpu_amx.h"

namespace flexvar::FLEXVAR_ISA {

template <typename W>
struct WeightBlock {
  const W* weight;                   // [columns, depth]
  int64_t columns, depth;            // behind the last column that one again: nobody reads its sums
  int64_t column_begin, column_end;  // a multiple of 32 apart
};

struct WeightPanel {
  int64_t column, k, steps;
  LeftTiles tiles;
};

template <int kParts, typename W>
class WeightAhead {
 public:
  // `place` has kLinearAmxPanelBytes.
  WeightAhead(const WeightBlock<W>& block, int64_t row_pairs, char* place)
      : block_(block),
        down_the_depth_(row_pairs == 1),
        share_(divide_up(runs_of(down_the_depth_ ? 1 : kSteps),
                         kProductsOfStep<kParts> * (down_the_depth_ ? 1 : kSteps * row_pairs))),
        place_(place),
        panel_{block.column_begin, 0},
        ahead_(panel_) {
    go_ahead();
    runs_allowed_ = runs_of(down_the_depth_ ? kSteps - 1 : kSteps);
    pack(runs_allowed_);
    begin_panel();
  }

  bool is_left() const { return panel_.column < block_.column_end; }
  // Its places hold until next_panel().
  WeightPanel panel() const {
    return {panel_.column,
            panel_.k,
            steps_of(panel_),
            {{place_, place_ + kParts * kTileBytes}, places_of_steps_}};
  }
  void next_panel() {
    pack(runs_allowed_);
    panel_ = next(panel_);
    begin_panel();
  }

  // Called by multiply_tiles.
  void begin_step() {
    if (down_the_depth_) runs_allowed_ += runs_of(1);
  }
  inline __attribute__((always_inline)) void advance() { pack(share_); }

 private:
  static constexpr int64_t kColumns = 2 * kTileRows;
  static constexpr int64_t kSteps = kTileSteps<kParts>;
  static constexpr int64_t kStepBytes = 2 * kParts * kTileBytes;
  static_assert(2 * kSteps * kStepBytes <= kLinearAmxPanelBytes);
  // How far down its row a step is asked for before it is packed.
  static constexpr int64_t kStepsAsked = 8;

  struct Panel {
    int64_t column, k;
    int64_t first_slot = 0;  // the place of its first step
  };

  // Packing goes by runs: some rows of a step down the depth, otherwise all steps of a row.
  static constexpr int64_t kRowsOfRun = 2;
  int64_t runs_of(int64_t steps) const {
    return down_the_depth_ ? steps * kColumns / kRowsOfRun : kColumns;
  }
  int64_t steps_of(const Panel& panel) const {
    const int64_t steps = divide_up(block_.depth - panel.k, kTileDepth);
    return steps < kSteps ? steps : kSteps;
  }
  Panel next(const Panel& panel) const {
    const int64_t next_column = panel.column + kColumns, next_k = panel.k + kSteps * kTileDepth;
    if (down_the_depth_) {
      const int64_t slot = (panel.first_slot + steps_of(panel)) % kSteps;
      if (next_k < block_.depth) return {panel.column, next_k, slot};
      return {next_column, 0, slot};
    }
    const int64_t slot = kSteps - panel.first_slot;
    if (next_column < block_.column_end) return {next_column, panel.k, slot};
    if (next_k < block_.depth) return {block_.column_begin, next_k, slot};
    return {block_.column_end, 0, slot};
  }
  int64_t place_of_step(const Panel& panel, int64_t step) const {
    const int64_t slot = panel.first_slot + step;
    return (down_the_depth_ ? slot % kSteps : slot) * kStepBytes;
  }
  void begin_panel() {
    if (!is_left()) return;
    for (int64_t step = 0; step < steps_of(panel_); ++step) {
      places_of_steps_[step] = place_of_step(panel_, step);
    }
    if (!down_the_depth_) runs_allowed_ = runs_of(kSteps);
  }

  const W* weight_of(const Panel& panel) const {
    return block_.weight + panel.column * block_.depth + panel.k;
  }
  // To what is packed next: from step_ and row_ of a panel on.
  void go_ahead() {
    if (ahead_.column >= block_.column_end) return;
    last_row_ = block_.columns - 1 - ahead_.column;
    from_ = weight_of(ahead_) + step_ * kTileDepth;
    depth_left_ = block_.depth - ahead_.k - step_ * kTileDepth;
    steps_ = steps_of(ahead_);
    to_ = place_ + place_of_step(ahead_, step_);
    if (!down_the_depth_) {
      asked_ = weight_of(next(ahead_)) - weight_of(ahead_);
    } else if (depth_left_ > kStepsAsked * kTileDepth) {
      asked_ = kStepsAsked * kTileDepth;
    } else {
      asked_ = kStepsAsked * kTileDepth + (kColumns - 1) * block_.depth;
    }
  }
  inline __attribute__((always_inline)) void pack(int64_t runs) {
    for (; runs > 0 && runs_allowed_ > 0; --runs, --runs_allowed_) pack_run();
  }
  inline __attribute__((always_inline)) void pack_run() {
    if (ahead_.column >= block_.column_end) return;
    char* const to = to_ + row_ / kTileRows * kParts * kTileBytes + row_ % kTileRows * 64;
    if (down_the_depth_) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < kRowsOfRun; ++i)
        pack_step(row_from(row_ + i), to + i * 64, depth_left_);
      row_ += kRowsOfRun;
      if (row_ < kColumns) return;
      ++step_;
    } else {
      const W* const from = row_from(row_);
      for (int64_t s = 0; s < steps_; ++s) {
        pack_step(from + s * kTileDepth, to + s * kStepBytes, depth_left_ - s * kTileDepth);
      }
      if (++row_ < kColumns) return;
      step_ = steps_;
    }
    row_ = 0;
    if (step_ == steps_) {
      step_ = 0;
      ahead_ = next(ahead_);
    }
    go_ahead();
  }
  const W* row_from(int64_t row) const {
    return from_ + (row < last_row_ ? row : last_row_) * block_.depth;
  }
  inline __attribute__((always_inline)) void pack_step(const W* from, char* to,
                                                       int64_t depth_left) {
    for (int64_t j = 0; j < kTileDepth; j += 64 / int64_t{sizeof(W)}) {
      __builtin_prefetch(from + asked_ + j, 0, 2);
    }
    store_tile_vectors(to, depth_left >= kTileDepth
                               ? load_tile_vectors<kParts>(from)
                               : load_last_tile_vectors<kParts>(from, depth_left));
  }

  const WeightBlock<W> block_;
  const bool down_the_depth_;
  const int64_t share_;  // runs at each product
  char* const place_;

  Panel panel_;  // which is multiplied
  int64_t places_of_steps_[kSteps];

  Panel ahead_;  // which is packed, up to this step and row
  int64_t step_ = 0, row_ = 0;
  int64_t runs_allowed_ = 0;  // that find a place
  const W* from_;
  char* to_;
  int64_t last_row_, steps_, depth_left_, asked_;
};

}  // namespace flexvar::FLEXVAR_ISA
