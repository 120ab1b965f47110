// The reduction of linear_importance on the CPU: one read of a block of per-sample weight gradients, which the caller
// has just formed and which is still in the cache, and of the block's weights.
//
// The sample loop is the innermost one around a vector of lanes: mean and mean square of the gradients live in
// registers and are never stored. What is stored and loaded again is a short vector of signed sums per sample, which
// stays in the L1 cache. float32 sums stay short (kFlush additions) and are then added in double. Every unit belongs to
// one task, and tasks depend on the shape alone: the same bits for any thread count and instruction set.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace hywia {
namespace {

constexpr int64_t kLanes = 32;    // columns taken at once
constexpr int64_t kFlush = 32;    // float32 additions per sum before it is added in double
constexpr int64_t kStrip = 128;   // columns of a task, at most, when the units are columns
constexpr int64_t kRowTask = 4;   // rows of a task when the units are rows
constexpr int64_t kAhead = 1024;  // bytes of each sample's gradient asked for before they are needed
constexpr int64_t kOrders = 3;    // first, second, mixed

// float32 sums of kLanes columns: `fine` one vector per order, `pitch` elements apart, `coarse` one per sample.
struct Lanes {
    float* fine;
    float* coarse;
    int64_t pitch;
};

// Adds the terms of n <= kLanes columns of one row. `all` is a compile-time n of kLanes.
template <bool squares, bool all>
HYWIA_INLINE void add_lanes(const SampleImportanceArgs& a, int64_t row, int64_t column, int64_t count, const float* w,
                            Lanes sums) {
    const int64_t n = all ? kLanes : count, plane = a.rows * a.columns, at = row * a.columns + column;
    float mean[kLanes] = {}, square[kLanes] = {};
    if (!a.first) {
        for (int64_t j = 0; j < n; ++j) mean[j] = a.mean[at + j];
        if constexpr (squares)
            for (int64_t j = 0; j < n; ++j) square[j] = a.square[at + j];
    }
    for (int64_t s = 0; s < a.samples; ++s) {
        const float* __restrict g = a.gradients + s * plane + at;
        float* __restrict coarse = sums.coarse + s * sums.pitch;
        if constexpr (all) {
            __builtin_prefetch(g + kAhead / 4);
            __builtin_prefetch(g + kAhead / 4 + 16);
        }
        for (int64_t j = 0; j < n; ++j) {
            mean[j] += g[j];
            if constexpr (squares) square[j] += g[j] * g[j];
            coarse[j] += g[j] * w[j];
        }
    }
    if (!a.last) {
        for (int64_t j = 0; j < n; ++j) a.mean[at + j] = mean[j];
        if constexpr (squares)
            for (int64_t j = 0; j < n; ++j) a.square[at + j] = square[j];
        return;
    }
    float* __restrict fine = sums.fine;
    const float share = a.share;
    for (int64_t j = 0; j < n; ++j) {
        const float first = mean[j] * share * w[j];
        fine[j] += std::fabs(first);
        if constexpr (squares) {
            const float second = 0.5f * (square[j] * share) * w[j] * w[j];
            fine[sums.pitch + j] += second;  // negative only as NaN, which stays
            fine[2 * sums.pitch + j] += std::fabs(first - second);
        }
    }
}

// Columns [begin, end) of one row; with `by_row` all of them share one vector of lanes.
template <bool squares, bool by_row>
HYWIA_INLINE void add_row(const SampleImportanceArgs& a, int64_t row, int64_t begin, int64_t end, const float* w,
                          Lanes sums) {
    for (int64_t at = begin; at < end; at += kLanes) {
        const int64_t shift = by_row ? 0 : at - begin;
        const Lanes lanes = {sums.fine + shift, sums.coarse + shift, sums.pitch};
        if (end - at >= kLanes)
            add_lanes<squares, true>(a, row, at, kLanes, w + (at - begin), lanes);
        else
            add_lanes<squares, false>(a, row, at, end - at, w + (at - begin), lanes);
    }
}

HYWIA_CLONES void add_along_row(const SampleImportanceArgs& a, int64_t row, int64_t begin, int64_t end, const float* w,
                                Lanes sums) {
    a.squares ? add_row<true, true>(a, row, begin, end, w, sums) : add_row<false, true>(a, row, begin, end, w, sums);
}

HYWIA_CLONES void add_to_columns(const SampleImportanceArgs& a, int64_t row, int64_t begin, int64_t end, const float* w,
                                 Lanes sums) {
    a.squares ? add_row<true, false>(a, row, begin, end, w, sums) : add_row<false, false>(a, row, begin, end, w, sums);
}

HYWIA_CLONES void weights(const Operand& weight, int64_t row, int64_t begin, int64_t n, float* out) {
    const int64_t step = weight.reduce_stride, from = row * weight.unit_stride + begin * step;
    const uint16_t* half = static_cast<const uint16_t*>(weight.data) + from;
    const float* single = static_cast<const float*>(weight.data) + from;
    if (weight.dtype == DType::Float32)
        for (int64_t i = 0; i < n; ++i) out[i] = single[i * step];
    else if (weight.dtype == DType::BFloat16)
        for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_to_float(half[i * step]);
    else
        for (int64_t i = 0; i < n; ++i) out[i] = float16_to_float(half[i * step]);
}

// Row sums: the columns fold into one vector of lanes, moved into double every kFlush of them, then across the lanes.
void row_task(const SampleImportanceArgs& a, int64_t begin, int64_t end) {
    const int64_t vectors = kOrders + a.samples, piece = kLanes * kFlush;
    std::vector<float> lanes(vectors * kLanes), w(std::min(piece, a.columns));
    const Lanes sums = {lanes.data(), lanes.data() + kOrders * kLanes, kLanes};
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t at = 0; at < a.columns; at += piece) {
            const int64_t stop = std::min(a.columns, at + piece);
            std::fill(lanes.begin(), lanes.end(), 0.0f);
            weights(a.weight, row, at, stop - at, w.data());
            add_along_row(a, row, at, stop, w.data(), sums);
            for (int64_t v = 0; v < vectors; ++v) {
                double total = 0;
                for (int64_t j = 0; j < kLanes; ++j) total += lanes[v * kLanes + j];
                (v < kOrders ? a.fine + v * a.pitch : a.coarse + (v - kOrders) * a.pitch)[row] += total;
            }
        }
    }
}

// Column sums: a strip of columns keeps its own lanes, moved into double every kFlush rows.
void column_task(const SampleImportanceArgs& a, int64_t begin, int64_t end) {
    const int64_t vectors = kOrders + a.samples, width = end - begin;
    std::vector<float> lanes(vectors * kStrip);
    float w[kStrip];
    const Lanes sums = {lanes.data(), lanes.data() + kOrders * kStrip, kStrip};
    for (int64_t row = 0; row < a.rows; ++row) {
        weights(a.weight, row, begin, width, w);
        add_to_columns(a, row, begin, end, w, sums);
        if ((row + 1) % kFlush && row + 1 < a.rows) continue;
        for (int64_t v = 0; v < vectors; ++v) {
            double* total = (v < kOrders ? a.fine + v * a.pitch : a.coarse + (v - kOrders) * a.pitch) + begin;
            for (int64_t j = 0; j < width; ++j) total[j] += lanes[v * kStrip + j];
        }
        std::fill(lanes.begin(), lanes.end(), 0.0f);
    }
}

}  // namespace

void sample_importance_cpu(const SampleImportanceArgs& a) {
    const int64_t size = a.axis == 0 ? a.rows : a.columns;
    const int64_t eighth = (size / 8 + kLanes - 1) / kLanes * kLanes;  // an even number of strips, where it can be
    const int64_t step = a.axis == 0 ? kRowTask : std::clamp(eighth, kLanes, kStrip);
    const int threads = useful_threads(a.threads, a.rows * a.columns * a.samples);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < size; begin += step) {
        const int64_t end = std::min(size, begin + step);
        a.axis == 0 ? row_task(a, begin, end) : column_task(a, begin, end);
    }
}

}  // namespace hywia
