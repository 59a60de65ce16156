// Tiles of block-causal attention. A token of scale i attends to the tokens of all scales <= i, so
// the queries of a scale share one range of keys [0, end of the scale), and the keys of a scale one
// range of queries [start of the scale, L). Tiles never cross the end of a scale: none needs a
// mask.
#pragma once

#include <stdint.h>

namespace flexvar {

// Queries [query_begin, query_end) against keys [0, key_end).
struct QueryTile {
  int32_t query_begin;
  int32_t query_end;
  int32_t key_end;
};

// Keys [key_begin, key_end) against queries [query_begin, L).
struct KeyTile {
  int32_t key_begin;
  int32_t key_end;
  int32_t query_begin;
};

}  // namespace flexvar
