// The one inner loop: a tile of rows times panels of 16 columns, every output accumulated strictly in the order of k.
#pragma once

#include "plan.h"
#include "simd.h"

namespace kangaroo {
namespace KANGAROO_ISA {

// Rows a tile may have: what keeps rows x panels accumulators, the weights and a broadcast in registers.
#if defined(__AVX512F__)
constexpr size_t kMaxRows = 8;
constexpr size_t kRowsOfFourPanels = 5;
constexpr size_t panels_for(size_t rows) { return rows <= kRowsOfFourPanels ? 4 : 2; }
#elif defined(__AVX2__)
constexpr size_t kMaxRows = 6;
constexpr size_t panels_for(size_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#elif defined(__aarch64__)
constexpr size_t kMaxRows = 6;
constexpr size_t panels_for(size_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr size_t kMaxRows = 2;
constexpr size_t panels_for(size_t) { return 1; }
#endif

// Rows of a tile over keys or values. Where more rows leave registers for fewer panels, a position's values are fetched
// from afar a part at a time; fewer rows go over them again, but find them in the nearest cache.
#if defined(__AVX512F__)
constexpr size_t kAttentionRows = kRowsOfFourPanels;
#else
constexpr size_t kAttentionRows = kMaxRows;
#endif

// Where a tile's operands lie: input k of row m at x[m * row_stride + k], the weights of input k and panel p at
// w[p * panel_stride + k * step], output column 16 p + j of row m at out[m * out_stride + 16 p + j].
struct TileStrides {
  size_t row, panel, step, out;
};

// What is fetched while the panels of a tile are multiplied: a panel for each of them.
template <class W>
struct Ahead {
  const W* panels[4];

  // Panels one behind the other.
  Ahead(const W* first, size_t stride) {
    for (size_t p = 0; p < 4; ++p) panels[p] = first + p * stride;
  }
};

// How many inputs' weights one load brings.
template <class W>
constexpr int kDepth = 1;
template <>
constexpr int kDepth<BFloat16> = 2;

template <class W>
inline void load_weights(const W* from, Lanes (&weights)[kDepth<W>]) {
  if constexpr (kDepth<W> == 2) {
    load_pair(from, weights[0], weights[1]);
  } else {
    weights[0] = load(from);
  }
}

template <int M, int P, class W>
void multiply_tile(const float* x, const W* w, const Ahead<W>& ahead, size_t count, const TileStrides& strides,
                   float* out) {
  constexpr int kInputs = kDepth<W>;
  const W* next[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) next[p] = ahead.panels[p];
  Lanes total[M][P];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) total[m][p] = broadcast(0.0f);
  }
  const size_t row = strides.row, panel = strides.panel, step = strides.step;
  size_t k = 0;
  for (; k + kInputs <= count; k += kInputs) {
    Lanes weights[P][kInputs];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      load_weights(w + p * panel + k * step, weights[p]);
      // The next panels come from memory while these are multiplied: the hardware looks ahead within a page only, and
      // with several rows a page takes longer to multiply than to fetch.
      __builtin_prefetch(next[p] + k * step, 0, 2);
    }
#pragma GCC unroll 2
    for (int d = 0; d < kInputs; ++d) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Lanes input = broadcast(x[m * row + k + d]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) total[m][p] = multiply_add(weights[p][d], input, total[m][p]);
      }
    }
  }
  if constexpr (kInputs == 2) {
    for (; k < count; ++k) {
      for (int p = 0; p < P; ++p) {
        Lanes weights[kInputs];
        load_weights(w + p * panel + k * step, weights);
        for (int m = 0; m < M; ++m) total[m][p] = multiply_add(weights[0], broadcast(x[m * row + k]), total[m][p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store(out + m * strides.out + p * 16, total[m][p]);
  }
}

template <int M, class W>
void multiply_panels(size_t panels, const float* x, const W* w, const Ahead<W>& ahead, size_t count,
                     const TileStrides& strides, float* out) {
  constexpr size_t kMost = panels_for(M);
  if constexpr (kMost >= 4) {
    if (panels >= 4) return multiply_tile<M, 4, W>(x, w, ahead, count, strides, out);
  }
  if constexpr (kMost >= 2) {
    if (panels >= 2) return multiply_tile<M, 2, W>(x, w, ahead, count, strides, out);
  }
  return multiply_tile<M, 1, W>(x, w, ahead, count, strides, out);
}

// How many of the panels left a tile of these rows takes.
inline size_t take_panels(size_t rows, size_t left) {
  const size_t most = panels_for(rows);
  return most >= 4 && left >= 4 ? 4 : most >= 2 && left >= 2 ? 2 : 1;
}

// One tile of rows (1..kMaxRows) and take_panels(rows, panels) panels.
template <class W>
void multiply(size_t rows, size_t panels, const float* x, const W* w, const Ahead<W>& ahead, size_t count,
              const TileStrides& strides, float* out) {
  switch (rows) {
    case 1: return multiply_panels<1, W>(panels, x, w, ahead, count, strides, out);
    case 2: return multiply_panels<2, W>(panels, x, w, ahead, count, strides, out);
#if defined(__AVX2__) || defined(__aarch64__)
    case 3: return multiply_panels<3, W>(panels, x, w, ahead, count, strides, out);
    case 4: return multiply_panels<4, W>(panels, x, w, ahead, count, strides, out);
    case 5: return multiply_panels<5, W>(panels, x, w, ahead, count, strides, out);
    case 6: return multiply_panels<6, W>(panels, x, w, ahead, count, strides, out);
#endif
#if defined(__AVX512F__)
    case 7: return multiply_panels<7, W>(panels, x, w, ahead, count, strides, out);
    case 8: return multiply_panels<8, W>(panels, x, w, ahead, count, strides, out);
#endif
  }
}

// Rows of the next tile when this many are left: as even as the most that fit allow.
inline size_t take_rows(size_t left, size_t most = kMaxRows) {
  const size_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// A thread's panels of a weight, whole pairs of a paired one.
inline std::pair<size_t, size_t> share_of(const Weight& weight, const Team& team) {
  const size_t unit = weight.paired ? 2 : 1;
  const auto [first, last] = team.share(weight.num_panels() / unit);
  return {unit * first, unit * last};
}

// Where a thread's panels of a weight begin.
inline const char* start_of_share(const Weight& weight, const Team& team) {
  return weight.panels->as<char>() + share_of(weight, team).first * weight.panel_size() * bytes_of(weight.storage);
}

// A weight to multiply by, and the one after it, to be fetched in time; null where that is not known.
using Upcoming = std::pair<const Weight&, const Weight*>;

// Multiply rows x [num_rows, num_inputs] by a thread's share of a weight. finish(row, panel, taken, values) receives
// 16 outputs of each of the panels taken, which are whole pairs where the weight is paired.
template <class W, class Finish>
void multiply_weight_as(const Upcoming& upcoming, const float* x, size_t num_rows, size_t row_stride, const Team& team,
                        const Finish& finish) {
  const Weight& weight = upcoming.first;
  const size_t count = weight.num_inputs, per_panel = weight.panel_size();
  const auto [first, last] = share_of(weight, team);
  const W* data = weight.panels->as<W>();
  // Behind the share begins that of the weight to come; the other threads' panels are not for this one's cache.
  const Weight& following = upcoming.second ? *upcoming.second : weight;
  const W* beyond = reinterpret_cast<const W*>(start_of_share(following, team));
  alignas(64) float out[kMaxRows][64];
  const TileStrides strides{row_stride, per_panel, 16, 64};
  // Scores of many rows are best served panel by panel, which stay in the cache while the rows pass by.
  const size_t largest_tile = num_rows < kMaxRows ? num_rows : take_rows(num_rows);
  for (size_t panel = first; panel < last;) {
    size_t taken = take_panels(largest_tile, last - panel);
    if (weight.paired && taken == 1) taken = 2;
    for (size_t row = 0; row < num_rows;) {
      const size_t rows = take_rows(num_rows - row);
      for (size_t done = 0; done < taken;) {
        const size_t now = take_panels(rows, taken - done);
        Ahead<W> ahead(data + (panel + done + taken) * per_panel, per_panel);
        for (size_t p = 0; p < now; ++p) {
          const size_t next = panel + done + taken + p;
          if (next >= last) ahead.panels[p] = beyond + (next - last) * per_panel;
        }
        multiply<W>(rows, now, x + row * row_stride, data + (panel + done) * per_panel, ahead, count, strides,
                    &out[0][done * 16]);
        done += now;
      }
      for (size_t m = 0; m < rows; ++m) finish(row + m, panel, taken, &out[m][0]);
      row += rows;
    }
    panel += taken;
  }
}

template <class Finish>
void multiply_weight(const Upcoming& upcoming, const float* x, size_t num_rows, size_t row_stride, const Team& team,
                     const Finish& finish) {
  switch (upcoming.first.storage) {
    case Storage::float32:
      return multiply_weight_as<float>(upcoming, x, num_rows, row_stride, team, finish);
    case Storage::bfloat16:
      return multiply_weight_as<BFloat16>(upcoming, x, num_rows, row_stride, team, finish);
    case Storage::float16:
      return multiply_weight_as<Float16>(upcoming, x, num_rows, row_stride, team, finish);
    case Storage::int8:
      return multiply_weight_as<int8_t>(upcoming, x, num_rows, row_stride, team, finish);
  }
}

// The outputs of one panel as the weight's owner means them: scaled (int8) and with the bias added.
inline Lanes finished(const Weight& weight, size_t panel, const float* values) {
  Lanes out = load(values);
  if (!weight.scales.empty()) out = out * load(weight.scales.data() + panel * 16);
  if (!weight.bias.empty()) out = out + load(weight.bias.data() + panel * 16);
  return out;
}

}  // namespace KANGAROO_ISA
}  // namespace kangaroo
