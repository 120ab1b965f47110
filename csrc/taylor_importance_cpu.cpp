// Taylor importance on the CPU: one read of the operands, at memory speed, the same bits for any thread count and ISA.
//
// The operands are views [units, reduce]. The work is cut into tasks whose shape depends on the matrix alone; each task
// leaves its sums in its own slot of a table of doubles, and one fixed loop adds the slots. Inside a task, float32 sums
// stay short (at most `kFlush` additions per lane) and are then added in double.
//
//   row tasks     a few rows times a piece of the reduction: dot products. Rows that are not contiguous are gathered
//                 into the same buffers first, so this also covers every odd layout.
//   column tasks  the units lie contiguously in memory: rows are added into a strip of sums.
//
// Tiles are converted to float32 buffers that stay in the L1 cache, so three dtypes for each of three operands need
// three converters and two kernels instead of 27 kernels.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace hywia {
namespace {

constexpr int64_t kLanes = 32;        // independent float32 sums of a row kernel
constexpr int64_t kTile = 1024;       // elements converted at once: 4 KiB per operand
constexpr int64_t kFlush = 32;        // float32 additions per sum before it is added in double
constexpr int64_t kTask = 1 << 19;    // elements per task, about
constexpr int64_t kStrip = 8192;      // units of a column task: 64 KiB of float32 sums
constexpr int64_t kColumnRows = 4;    // rows and
constexpr int64_t kColumnTile = 256;  // columns converted at once by a column task
constexpr int64_t kNarrow = 32;       // fewer contiguous units than this: not worth a strip, gather instead
constexpr int64_t kGatherRows = 16;   // units gathered together, so that a cache line read once serves all of them
constexpr int64_t kGatherTile = 256;  // and elements of each of them

static_assert(kTile <= kLanes * kFlush, "a row tile must not outgrow the float32 sums");

HYWIA_CLONES void bfloat16_tile(const uint16_t* source, int64_t n, float* tile) {
    for (int64_t i = 0; i < n; ++i) tile[i] = bfloat16_to_float(source[i]);
}

HYWIA_CLONES void float16_tile(const uint16_t* source, int64_t n, float* tile) {
    for (int64_t i = 0; i < n; ++i) tile[i] = float16_to_float(source[i]);
}

// `n` contiguous elements as float32; float32 itself is read in place.
HYWIA_INLINE const float* contiguous_tile(const Operand& x, int64_t offset, int64_t n, float* buffer) {
    const char* ahead = static_cast<const char*>(x.data) + (offset + n) * element_size(x.dtype);
    for (int64_t i = 0; i < n * element_size(x.dtype); i += 64) __builtin_prefetch(ahead + i);
    if (x.dtype == DType::Float32) return static_cast<const float*>(x.data) + offset;
    const uint16_t* source = static_cast<const uint16_t*>(x.data) + offset;
    x.dtype == DType::BFloat16 ? bfloat16_tile(source, n, buffer) : float16_tile(source, n, buffer);
    return buffer;
}

template <typename T, typename Convert>
void gather(const T* source, int64_t row_stride, int64_t stride, int64_t rows, int64_t n, float* tile,
            Convert convert) {
    if (row_stride < stride) {  // follow memory: the row index runs fastest
        for (int64_t i = 0; i < n; ++i)
            for (int64_t r = 0; r < rows; ++r) tile[r * n + i] = convert(source[r * row_stride + i * stride]);
    } else {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < n; ++i) tile[r * n + i] = convert(source[r * row_stride + i * stride]);
    }
}

// A [rows, n] piece of any layout as a dense float32 tile.
void gathered_tile(const Operand& x, int64_t offset, int64_t rows, int64_t n, float* tile) {
    const uint16_t* half = static_cast<const uint16_t*>(x.data) + offset;
    switch (x.dtype) {
        case DType::Float32:
            return gather(static_cast<const float*>(x.data) + offset, x.unit_stride, x.reduce_stride, rows, n, tile,
                          [](float v) { return v; });
        case DType::BFloat16:
            return gather(half, x.unit_stride, x.reduce_stride, rows, n, tile, bfloat16_to_float);
        case DType::Float16:
            return gather(half, x.unit_stride, x.reduce_stride, rows, n, tile, float16_to_float);
    }
}

template <Order order>
HYWIA_INLINE float term(const float* w, const float* g, const float* f, int64_t i) {
    if constexpr (order == Order::First) return g[i] * w[i];
    if constexpr (order == Order::Second) return 0.5f * f[i] * w[i] * w[i];
    if constexpr (order == Order::Mixed) return g[i] * w[i] - 0.5f * f[i] * w[i] * w[i];
}

struct Sums {
    double fine = 0, signed_sum = 0;
};

// Sums of one tile, n <= kTile. Lane j always takes the elements j, j + 32, ..., and the lanes are always added in the
// same order, whatever the width of the vector unit.
template <Order order>
HYWIA_INLINE void row_tile(const float* w, const float* g, const float* f, int64_t n, Sums& sums) {
    float fine[kLanes] = {}, signed_sum[kLanes] = {};
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) {
            const float t = term<order>(w, g, f, i + j);
            fine[j] += std::fabs(t);
            signed_sum[j] += t;
        }
    }
    for (int64_t i = whole; i < n; ++i) {
        const float t = term<order>(w, g, f, i);
        fine[i - whole] += std::fabs(t);
        signed_sum[i - whole] += t;
    }
    for (int64_t j = 0; j < kLanes; ++j) {
        sums.fine += fine[j];
        sums.signed_sum += signed_sum[j];
    }
}

HYWIA_CLONES void row_kernel(Order order, const float* w, const float* g, const float* f, int64_t n, Sums* sums) {
    if (order == Order::First) row_tile<Order::First>(w, g, f, n, *sums);
    if (order == Order::Second) row_tile<Order::Second>(w, g, f, n, *sums);
    if (order == Order::Mixed) row_tile<Order::Mixed>(w, g, f, n, *sums);
}

// A few rows of one operand as float32, `pitch` elements apart.
struct Rows {
    const float* data = nullptr;
    int64_t pitch = 0;
};

// Adds `rows` rows of n <= kColumnTile terms to n sums: a sum is loaded and stored once for all of them.
template <Order order, int64_t rows>
HYWIA_INLINE void column_tile(Rows w, Rows g, Rows f, int64_t n, float* __restrict fine, float* __restrict signed_sum) {
    for (int64_t i = 0; i < n; ++i) {
        float sum = signed_sum[i], magnitude = fine[i];
        for (int64_t r = 0; r < rows; ++r) {
            const float t = term<order>(w.data + r * w.pitch, g.data + r * g.pitch, f.data + r * f.pitch, i);
            sum += t;
            magnitude += std::fabs(t);
        }
        signed_sum[i] = sum;
        fine[i] = magnitude;
    }
}

template <Order order>
HYWIA_INLINE void column_rows(Rows w, Rows g, Rows f, int64_t rows, int64_t n, float* fine, float* signed_sum) {
    if (rows == kColumnRows) return column_tile<order, kColumnRows>(w, g, f, n, fine, signed_sum);
    for (int64_t r = 0; r < rows; ++r, w.data += w.pitch, g.data += g.pitch, f.data += f.pitch)
        column_tile<order, 1>(w, g, f, n, fine, signed_sum);
}

HYWIA_CLONES void column_kernel(Order order, const Rows* wgf, int64_t rows, int64_t n, float* fine, float* signed_sum) {
    const Rows w = wgf[0], g = wgf[1], f = wgf[2];
    if (order == Order::First) column_rows<Order::First>(w, g, f, rows, n, fine, signed_sum);
    if (order == Order::Second) column_rows<Order::Second>(w, g, f, rows, n, fine, signed_sum);
    if (order == Order::Mixed) column_rows<Order::Mixed>(w, g, f, rows, n, fine, signed_sum);
}

// Moves a strip's float32 sums into its doubles and clears them.
HYWIA_CLONES void flush(float* __restrict sums, int64_t n, double* __restrict total) {
    for (int64_t i = 0; i < n; ++i) {
        total[i] += sums[i];
        sums[i] = 0.0f;
    }
}

struct Buffers {
    alignas(64) float weight[kGatherRows * kGatherTile], grad[kGatherRows * kGatherTile],
        fisher[kGatherRows * kGatherTile];
};
static_assert(kTile <= kGatherRows * kGatherTile, "the buffers serve both kinds of tile");

int64_t offset_of(const Operand& x, int64_t unit, int64_t position) {
    return unit * x.unit_stride + position * x.reduce_stride;
}

template <typename Predicate>
bool all_operands(const TaylorImportanceArgs& a, Predicate predicate) {
    for (const Operand* x : {&a.weight, &a.grad, &a.fisher})
        if (x->data && !predicate(*x)) return false;
    return true;
}

// One row, contiguous in every operand.
void contiguous_row(const TaylorImportanceArgs& a, int64_t unit, int64_t begin, int64_t end, Buffers& b, Sums& sums) {
    for (int64_t at = begin; at < end; at += kTile) {
        const int64_t n = std::min(kTile, end - at);
        const auto tile = [&](const Operand& x, float* buffer) {
            return x.data ? contiguous_tile(x, offset_of(x, unit, at), n, buffer) : nullptr;
        };
        row_kernel(a.order, tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher), n, &sums);
    }
}

// A few rows of any layout.
void gathered_rows(const TaylorImportanceArgs& a, int64_t unit, int64_t rows, int64_t begin, int64_t end, Buffers& b,
                   Sums* sums) {
    for (int64_t at = begin; at < end; at += kGatherTile) {
        const int64_t n = std::min(kGatherTile, end - at);
        const auto tile = [&](const Operand& x, float* buffer) {
            if (x.data) gathered_tile(x, offset_of(x, unit, at), rows, n, buffer);
        };
        tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher);
        for (int64_t r = 0; r < rows; ++r)
            row_kernel(a.order, b.weight + r * n, b.grad + r * n, b.fisher + r * n, n, sums + r);
    }
}

void write(const TaylorImportanceArgs& a, int64_t unit, const Sums& sums) {
    a.fine[unit] = float(a.accumulate ? a.fine[unit] + sums.fine : sums.fine);
    a.signed_sum[unit] = float(a.accumulate ? a.signed_sum[unit] + sums.signed_sum : sums.signed_sum);
}

void by_rows(const TaylorImportanceArgs& a) {
    const bool contiguous = all_operands(a, [](const Operand& x) { return x.reduce_stride == 1; });
    const int64_t block = contiguous ? std::clamp(kTask / a.reduce, int64_t(1), int64_t(64)) : kGatherRows;
    const int64_t pieces = (a.reduce * (contiguous ? 1 : block) + kTask - 1) / kTask;
    const int64_t length = ((a.reduce + pieces - 1) / pieces + kTile - 1) / kTile * kTile;
    const int64_t blocks = (a.units + block - 1) / block;
    const int threads = useful_threads(a.threads, a.units * a.reduce);
    std::vector<Sums> table(a.units * pieces);  // [pieces, units]
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t at = 0; at < blocks; ++at) {
            Buffers buffers;
            const int64_t unit = at * block, rows = std::min(block, a.units - unit);
            const int64_t begin = std::min(a.reduce, piece * length), end = std::min(a.reduce, begin + length);
            Sums* sums = table.data() + piece * a.units + unit;
            if (!contiguous)
                gathered_rows(a, unit, rows, begin, end, buffers, sums);
            else
                for (int64_t r = 0; r < rows; ++r) contiguous_row(a, unit + r, begin, end, buffers, sums[r]);
        }
    }
    for (int64_t unit = 0; unit < a.units / a.group_size; ++unit) {
        Sums total;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const Sums* sums = table.data() + piece * a.units + unit * a.group_size;
            for (int64_t r = 0; r < a.group_size; ++r) {
                total.fine += sums[r].fine;
                total.signed_sum += sums[r].signed_sum;
            }
        }
        write(a, unit, total);
    }
}

// Rows `begin` to `end` of the reduction for up to kStrip units. A row is read from end to end before the next one: the
// hardware prefetchers follow that at memory speed, while narrow strips that fit the L1 cache ran four times slower.
void strip_task(const TaylorImportanceArgs& a, int64_t unit, int64_t width, int64_t begin, int64_t end, double* fine,
                double* signed_sum) {
    Buffers b;
    std::vector<float> sums(2 * width);  // float32 sums, in the L2 cache
    for (int64_t at = begin, added = 0; at < end; at += kColumnRows) {
        const int64_t rows = std::min(kColumnRows, end - at);
        for (int64_t first = 0; first < width; first += kColumnTile) {
            const int64_t n = std::min(kColumnTile, width - first);
            const auto tile = [&](const Operand& x, float* buffer) {
                Rows view;
                if (!x.data) return view;
                for (int64_t r = rows - 1; r >= 0; --r)
                    view.data = contiguous_tile(x, offset_of(x, unit + first, at + r), n, buffer + r * kColumnTile);
                view.pitch = x.dtype == DType::Float32 ? x.reduce_stride : kColumnTile;
                return view;
            };
            const Rows operands[3] = {tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher)};
            column_kernel(a.order, operands, rows, n, sums.data() + first, sums.data() + width + first);
        }
        added += rows;
        if (added == kFlush || at + rows == end) {
            flush(sums.data(), width, fine);
            flush(sums.data() + width, width, signed_sum);
            added = 0;
        }
    }
}

void by_columns(const TaylorImportanceArgs& a) {
    const int64_t strips = (a.units + kStrip - 1) / kStrip;
    const int64_t length = std::max(kFlush, kTask / std::min(a.units, kStrip));
    const int64_t pieces = (a.reduce + length - 1) / length;
    const int threads = useful_threads(a.threads, a.units * a.reduce);
    std::vector<double> table(2 * pieces * a.units);  // [pieces, fine and signed, units]
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t unit = strip * kStrip, begin = piece * length;
            double* fine = table.data() + 2 * piece * a.units + unit;
            strip_task(a, unit, std::min(kStrip, a.units - unit), begin, std::min(a.reduce, begin + length), fine,
                       fine + a.units);
        }
    }
    for (int64_t piece = 1; piece < pieces; ++piece)
        for (int64_t i = 0; i < 2 * a.units; ++i) table[i] += table[2 * piece * a.units + i];
    for (int64_t unit = 0; unit < a.units / a.group_size; ++unit) {
        Sums total;
        for (int64_t i = unit * a.group_size; i < (unit + 1) * a.group_size; ++i) {
            total.fine += table[i];
            total.signed_sum += table[a.units + i];
        }
        write(a, unit, total);
    }
}

}  // namespace

void taylor_importance_cpu(const TaylorImportanceArgs& args) {
    TaylorImportanceArgs a = args;
    for (Operand* x : {&a.weight, &a.grad, &a.fisher}) {  // the stride of a dimension of size one means nothing
        if (a.reduce == 1) x->reduce_stride = 1;
        if (a.units == 1) x->unit_stride = 1;
    }
    if (a.units == 0) return;
    if (a.reduce == 0) {
        for (int64_t unit = 0; unit < a.units / a.group_size; ++unit) write(a, unit, Sums{});
        return;
    }
    const bool rows = all_operands(a, [](const Operand& x) { return x.reduce_stride == 1; });
    const bool columns = all_operands(a, [](const Operand& x) { return x.unit_stride == 1; });
    if (columns && a.units >= kNarrow && (!rows || a.reduce == 1))
        by_columns(a);
    else
        by_rows(a);
}

}  // namespace hywia
