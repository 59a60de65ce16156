// Cuts block-causal attention into tiles (tile.h) and shares them out. The launchers of CPU and
// CUDA and, through flexvar_ext._host, the tests use the same plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "scale_attention/tile.h"

namespace flexvar {

// In order of their queries. `rows` is the largest number of queries of a tile.
inline std::vector<QueryTile> query_tiles(const std::vector<int64_t>& scale_lengths, int64_t rows) {
  std::vector<QueryTile> tiles;
  int64_t start = 0;
  for (const int64_t length : scale_lengths) {
    const int64_t end = start + length;
    for (int64_t begin = start; begin < end; begin += rows) {
      tiles.push_back({static_cast<int32_t>(begin),
                       static_cast<int32_t>(std::min(begin + rows, end)),
                       static_cast<int32_t>(end)});
    }
    start = end;
  }
  return tiles;
}

// The same, but whole scales that follow each other share a tile where they fit into it: fewer
// tiles, for which keys are read fewer times. `rows` is at most 64.
inline std::vector<QueryTile> joined_query_tiles(const std::vector<int64_t>& scale_lengths,
                                                 int64_t rows) {
  std::vector<QueryTile> tiles;
  for (const int64_t length : scale_lengths) {
    if (length == 0) continue;
    const int64_t start = tiles.empty() ? 0 : tiles.back().query_end;
    const bool is_joined = !tiles.empty() && tiles.back().scale_ends != 0 &&
                           start + length - tiles.back().query_begin <= rows;
    if (!is_joined) {
      for (const QueryTile& tile : query_tiles({length}, rows)) {
        tiles.push_back({static_cast<int32_t>(start + tile.query_begin),
                         static_cast<int32_t>(start + tile.query_end),
                         static_cast<int32_t>(start + length)});
      }
    }
    QueryTile& last = tiles.back();
    last.query_end = last.key_end = static_cast<int32_t>(start + length);
    if (is_joined) last.most_hidden += static_cast<int32_t>(length);
    if (is_joined || length <= rows) {
      last.scale_ends |= uint64_t{1} << (last.query_end - 1 - last.query_begin);
    }
  }
  return tiles;
}

// Every query against keys [0, key_end), as in a step of generation with a cache.
inline std::vector<QueryTile> step_tiles(int64_t queries, int64_t key_end, int64_t rows) {
  std::vector<QueryTile> tiles = query_tiles({queries}, rows);
  for (QueryTile& tile : tiles) tile.key_end = static_cast<int32_t>(key_end);
  return tiles;
}

// A step with fewer tiles than the `blocks` that run at a time is cut into parts of its keys, too,
// each a block of its own: a block alone on its multiprocessor waits for itself most of the time. A
// part costs a trip of its sums through memory, and all of them together a launch that adds them
// up: they get 128 keys or more. Returns the keys of a part, a multiple of `columns`, which a block
// takes at a time; or all keys.
inline int64_t keys_per_part(int64_t tiles, int64_t keys, int64_t columns, int64_t blocks) {
  const int64_t parts = std::min(blocks / std::max<int64_t>(tiles, 1), keys / 128);
  if (parts <= 1) return keys;
  const int64_t column_tiles = (keys + columns - 1) / columns;
  return (column_tiles + parts - 1) / parts * columns;
}

// In order of their keys. `rows` is the largest number of keys of a tile.
inline std::vector<KeyTile> key_tiles(const std::vector<int64_t>& scale_lengths, int64_t rows) {
  std::vector<KeyTile> tiles;
  for (const QueryTile& tile : query_tiles(scale_lengths, rows)) {
    tiles.push_back({tile.query_begin, tile.query_end, 0});
  }
  int64_t start = 0;
  size_t next = 0;
  for (const int64_t length : scale_lengths) {
    for (; next < tiles.size() && tiles[next].key_begin < start + length; ++next) {
      tiles[next].query_begin = static_cast<int32_t>(start);
    }
    start += length;
  }
  return tiles;
}

// The same, but every tile has `rows` keys, at most 64, whatever their scales, and only the last
// one has fewer: fewer tiles, for which queries are read fewer times.
inline std::vector<KeyTile> full_key_tiles(const std::vector<int64_t>& scale_lengths,
                                           int64_t rows) {
  std::vector<KeyTile> tiles;
  int64_t start = 0;
  for (const int64_t length : scale_lengths) {
    const int64_t end = start + length;
    for (int64_t begin = start; begin < end;) {
      if (tiles.empty() || tiles.back().key_end - tiles.back().key_begin == rows) {
        const int32_t key = static_cast<int32_t>(begin);
        tiles.push_back({key, key, static_cast<int32_t>(start)});
      } else if (begin == start) {
        tiles.back().scale_ends |= uint64_t{1} << (start - 1 - tiles.back().key_begin);
      }
      KeyTile& last = tiles.back();
      begin = std::min(last.key_begin + rows, end);
      last.key_end = static_cast<int32_t>(begin);
    }
    start = end;
  }
  return tiles;
}

// The scheduler of a GPU starts blocks in order: long tiles first leave no long tail.
inline std::vector<QueryTile> longest_first(std::vector<QueryTile> tiles) {
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const QueryTile& a, const QueryTile& b) { return a.key_end > b.key_end; });
  return tiles;
}
inline std::vector<KeyTile> longest_first(std::vector<KeyTile> tiles) {
  std::stable_sort(tiles.begin(), tiles.end(), [](const KeyTile& a, const KeyTile& b) {
    return a.query_begin < b.query_begin;
  });
  return tiles;
}

// Cuts `repeats` passes over tiles of these costs into at most `parts` runs of about equal cost:
// the indices where runs begin and the total number of items, ascending.
inline std::vector<int64_t> balanced_runs(const std::vector<int64_t>& costs, int64_t repeats,
                                          int64_t parts) {
  int64_t pass = 0;
  for (const int64_t cost : costs) pass += cost;
  const int64_t count = static_cast<int64_t>(costs.size());
  std::vector<int64_t> bounds{0};
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t target = pass * repeats / parts * part;
    int64_t item = pass == 0 ? 0 : target / pass * count;
    for (int64_t done = pass == 0 ? target : target / pass * pass; done < target; ++item) {
      done += costs[item % count];
    }
    if (item > bounds.back()) bounds.push_back(item);
  }
  if (repeats * count > bounds.back()) bounds.push_back(repeats * count);
  return bounds;
}

}  // namespace flexvar
