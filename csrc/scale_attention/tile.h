// Tiles of block-causal attention. A token of scale i attends to the tokens of all scales <= i, so
// the queries of a scale share one range of keys [0, end of the scale), and the keys of a scale one
// range of queries [start of the scale, L). Tiles do not cross the end of a scale and need no mask,
// but for tiles of queries of several whole scales, and tiles of keys of any scales.
#pragma once

#include <stdint.h>

namespace flexvar {

// Queries [query_begin, query_end) against keys [0, key_end).
struct QueryTile {
  int32_t query_begin;
  int32_t query_end;
  int32_t key_end;
  // How many of the keys, the last ones, the first query does not see.
  int32_t most_hidden = 0;
  // Of a tile of whole scales, at most 64 queries, bit i is set where query_begin + i is the last
  // query of a scale, which sees keys up to itself. 0: every query sees all keys.
  uint64_t scale_ends = 0;
};

// Keys [key_begin, key_end) against queries [query_begin, L).
struct KeyTile {
  int32_t key_begin;
  int32_t key_end;
  int32_t query_begin;
  // Of a tile of keys of several scales, at most 64, bit i is set where key_begin + i is the last
  // key of a scale and others follow in the tile: those are seen by queries behind it, from their
  // own scale on. 0: every query sees all keys.
  uint64_t scale_ends = 0;
};

}  // namespace flexvar
