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
// The kernels convert in registers, which needs one copy of them per pair of dtypes. The pairs that calibration meets
// have theirs (`fused`; float16's needs an instruction that not every processor has); every other mix, and every
// gathered layout, goes through float32 tiles in the L1 cache.
//
// The tasks of all matrices of a batch are shared out at once: a small matrix is one or two of them, and would leave
// threads without work, and the opening of a parallel region for each takes as long as its sums.
#include <cmath>
#include <vector>

#include "taylor_cpu.h"

#ifdef HYWIA_TARGET_CLONES
#include <immintrin.h>
#endif

namespace hywia {
namespace {

using namespace taylor;

constexpr int64_t kTask = 1 << 19;        // elements per row task, about
constexpr int64_t kStrip = 2048;          // units of a column task: its float32 sums take half of an L1 cache
constexpr int64_t kColumnTask = 1 << 20;  // elements per column task, about: few tables of sums to add up
constexpr int64_t kColumnTile = 128;      // columns of each that it converts at once, where it must
constexpr int64_t kNarrow = 32;           // fewer contiguous units than this: not worth a strip, gather instead
constexpr int64_t kGatherRows = 16;       // units gathered together, so that a cache line read once serves all of them
constexpr int64_t kGatherTile = 256;      // and elements of each of them

// Tiles of n contiguous elements as float32. `ahead` is what will be converted next: asked for line by line, as this
// tile is read, so that memory is never idle and never asked for more than it has room to answer.
HYWIA_CLONES void bfloat16_tile(const uint16_t* source, int64_t n, float* tile, const uint16_t* ahead) {
    for (int64_t i = 0; i < n; i += kLanes) {
        __builtin_prefetch(ahead + i);
        for (int64_t j = i; j < std::min(n, i + kLanes); ++j) tile[j] = bfloat16_to_float(source[j]);
    }
}

#ifdef HYWIA_TARGET_CLONES
// The instruction for it, on processors of x86-64-v3 and later: three times the speed of the arithmetic below.
__attribute__((target("arch=x86-64-v3"))) void float16_tile(const uint16_t* source, int64_t n, float* tile,
                                                            const uint16_t* ahead) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        __builtin_prefetch(ahead + i);
        for (int64_t j = i; j < i + kLanes; j += 8)
            _mm256_storeu_ps(tile + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j))));
    }
    for (; i < n; ++i) tile[i] = _cvtsh_ss(source[i]);
}
__attribute__((target("default")))
#endif
void float16_tile(const uint16_t* source, int64_t n, float* tile, const uint16_t* ahead) {
    for (int64_t i = 0; i < n; i += kLanes) {
        __builtin_prefetch(ahead + i);
        for (int64_t j = i; j < std::min(n, i + kLanes); ++j) tile[j] = float16_to_float(source[j]);
    }
}

// `n` contiguous elements as float32, float32 itself in place; those at offset `next` will follow.
HYWIA_INLINE const float* contiguous_tile(const Operand& x, int64_t offset, int64_t next, int64_t n, float* buffer) {
    if (x.dtype == DType::Float32) {
        const float* source = static_cast<const float*>(x.data);
        for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(source + next + i);
        return source + offset;
    }
    const uint16_t *source = static_cast<const uint16_t*>(x.data) + offset,
                   *ahead = static_cast<const uint16_t*>(x.data) + next;
    x.dtype == DType::BFloat16 ? bfloat16_tile(source, n, buffer, ahead) : float16_tile(source, n, buffer, ahead);
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

const void* address(const Operand& x, int64_t unit, int64_t position) {
    const int64_t offset = unit * x.unit_stride + position * x.reduce_stride;
    return x.data ? static_cast<const char*>(x.data) + offset * element_size(x.dtype) : nullptr;
}

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
void contiguous_row(const TaylorImportanceArgs& a, RowKernel kernel, int64_t unit, int64_t begin, int64_t end,
                    Buffers& b, Sums& sums) {
    if (kernel) {
        const auto from = [&](const Operand& x) { return address(x, unit, begin); };
        return kernel(a.order, from(a.weight), from(a.grad), from(a.fisher), end - begin, &sums);
    }
    for (int64_t at = begin; at < end; at += kTile) {
        const int64_t n = std::min(kTile, end - at);
        const auto tile = [&](const Operand& x, float* buffer) {
            return x.data ? contiguous_tile(x, offset_of(x, unit, at), offset_of(x, unit, at + kTile), n, buffer)
                          : nullptr;
        };
        tile_kernels().row(a.order, tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher), n, &sums);
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
            tile_kernels().row(a.order, b.weight + r * n, b.grad + r * n, b.fisher + r * n, n, sums + r);
    }
}

void write(const TaylorImportanceArgs& a, int64_t unit, const Sums& sums) {
    a.fine[unit] = float(a.accumulate ? a.fine[unit] + sums.fine : sums.fine);
    a.signed_sum[unit] = float(a.accumulate ? a.signed_sum[unit] + sums.signed_sum : sums.signed_sum);
}

// Adds a few rows of up to kStrip units, converting a tile at a time.
void tiled_rows(const TaylorImportanceArgs& a, int64_t unit, int64_t width, int64_t at, int64_t rows, Buffers& b,
                float* fine, float* signed_sum) {
    for (int64_t first = 0; first < width; first += kColumnTile) {
        const int64_t n = std::min(kColumnTile, width - first);
        const auto tile = [&](const Operand& x, float* buffer) {
            Rows view;
            if (!x.data) return view;
            const int64_t next = first + kColumnTile < width ? first + kColumnTile : 0;
            for (int64_t r = rows - 1; r >= 0; --r)
                view.data =
                    contiguous_tile(x, offset_of(x, unit + first, at + r),
                                    offset_of(x, unit + next, at + r + (next ? 0 : rows)), n, buffer + r * kColumnTile);
            view.pitch = x.dtype == DType::Float32 ? x.reduce_stride : kColumnTile;
            return view;
        };
        const Rows operands[3] = {tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher)};
        tile_kernels().column(a.order, operands, rows, n, fine + first, signed_sum + first);
    }
}

// Rows `begin` to `end` of the reduction for up to kStrip units.
void strip_task(const TaylorImportanceArgs& a, ColumnKernel kernel, int64_t unit, int64_t width, int64_t begin,
                int64_t end, double* fine, double* signed_sum) {
    Buffers b;
    float sums[2 * kStrip];
    std::fill(sums, sums + 2 * kStrip, 0.0f);
    for (int64_t at = begin, added = 0; at < end; at += kColumnRows) {
        const int64_t rows = std::min(kColumnRows, end - at);
        const auto from = [&](const Operand& x) { return Rows{address(x, unit, at), x.reduce_stride}; };
        const Rows operands[3] = {from(a.weight), from(a.grad), from(a.fisher)};
        if (kernel)
            kernel(a.order, operands, rows, width, sums, sums + kStrip);
        else
            tiled_rows(a, unit, width, at, rows, b, sums, sums + kStrip);
        added += rows;
        if (added == kFlush || at + rows == end) {
            flush(sums, width, fine);
            flush(sums + kStrip, width, signed_sum);
            added = 0;
        }
    }
}

// One matrix: how it is cut, and the tasks' sums.
struct Work {
    TaylorImportanceArgs a;
    Kernels kernels;
    bool columns = false;            // column tasks; else row tasks
    bool contiguous = false;         // of row tasks: no row is gathered
    int64_t across = 0;              // blocks of rows, or strips of units
    int64_t block = 0;               // units of each
    int64_t pieces = 0, length = 0;  // of the reduction
    std::vector<double> table;       // row tasks: [pieces, units, fine and signed]; column tasks: [pieces, 2, units]

    int64_t tasks() const { return across * pieces; }
    explicit Work(const TaylorImportanceArgs& args);
    void run(int64_t task);
    void run_rows(int64_t piece, int64_t unit);
    void finish();
};

Work::Work(const TaylorImportanceArgs& args) : a(args) {
    for (Operand* x : {&a.weight, &a.grad, &a.fisher}) {  // the stride of a dimension of size one means nothing
        if (a.reduce == 1) x->reduce_stride = 1;
        if (a.units == 1) x->unit_stride = 1;
    }
    if (a.units == 0 || a.reduce == 0) return;
    kernels = fused(a);
    contiguous = all_operands(a, [](const Operand& x) { return x.reduce_stride == 1; });
    columns = all_operands(a, [](const Operand& x) { return x.unit_stride == 1; }) && a.units >= kNarrow &&
              (!contiguous || a.reduce == 1);
    if (columns) {
        block = kStrip;
        // A matrix of a small model is less than one task of the usual size: then an eighth of it, for threads to
        // share.
        const int64_t eighth = ((a.reduce + 7) / 8 + kFlush - 1) / kFlush * kFlush;
        length = std::max(kFlush, std::min(eighth, kColumnTask / std::min(a.units, kStrip)));
        pieces = (a.reduce + length - 1) / length;
    } else {
        block = contiguous ? std::clamp(kTask / a.reduce, int64_t(1), int64_t(64)) : kGatherRows;
        pieces = (a.reduce * (contiguous ? 1 : block) + kTask - 1) / kTask;
        length = ((a.reduce + pieces - 1) / pieces + kTile - 1) / kTile * kTile;
    }
    across = (a.units + block - 1) / block;
    table.resize(2 * pieces * a.units);
}

void Work::run_rows(int64_t piece, int64_t unit) {
    Buffers buffers;
    const int64_t rows = std::min(block, a.units - unit);
    const int64_t begin = std::min(a.reduce, piece * length), end = std::min(a.reduce, begin + length);
    Sums sums[64];
    static_assert(kGatherRows <= 64, "a block of rows is at most 64");
    if (!contiguous)
        gathered_rows(a, unit, rows, begin, end, buffers, sums);
    else
        for (int64_t r = 0; r < rows; ++r) contiguous_row(a, kernels.row, unit + r, begin, end, buffers, sums[r]);
    for (int64_t r = 0; r < rows; ++r) {
        double* const to = table.data() + 2 * (piece * a.units + unit + r);
        to[0] = sums[r].fine, to[1] = sums[r].signed_sum;
    }
}

void Work::run(int64_t task) {
    const int64_t piece = task / across, unit = task % across * block;
    if (!columns) return run_rows(piece, unit);
    const int64_t begin = piece * length;
    double* const fine = table.data() + 2 * piece * a.units + unit;
    strip_task(a, kernels.column, unit, std::min(block, a.units - unit), begin, std::min(a.reduce, begin + length),
               fine, fine + a.units);
}

// Adds the tasks' sums, in an order that depends on the cut alone.
void Work::finish() {
    if (columns)
        for (int64_t piece = 1; piece < pieces; ++piece)
            for (int64_t i = 0; i < 2 * a.units; ++i) table[i] += table[2 * piece * a.units + i];
    const int64_t unit_step = columns ? 1 : 2, signed_at = columns ? a.units : 1, rounds = columns ? 1 : pieces;
    for (int64_t unit = 0; unit < a.units / a.group_size; ++unit) {
        Sums total;
        for (int64_t piece = 0; piece < rounds; ++piece) {
            const double* from = table.data() + 2 * piece * a.units + unit * a.group_size * unit_step;
            for (int64_t i = 0; i < a.group_size; ++i, from += unit_step) {
                total.fine += from[0];
                total.signed_sum += from[signed_at];
            }
        }
        write(a, unit, total);
    }
}

}  // namespace

void taylor_importance_cpu(const TaylorImportanceArgs* matrices, int64_t count, int threads) {
    std::vector<Work> work;
    std::vector<int64_t> first;  // task of each matrix
    int64_t tasks = 0, elements = 0;
    work.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
        work.emplace_back(matrices[i]);
        first.push_back(tasks);
        tasks += work.back().tasks(), elements += matrices[i].units * matrices[i].reduce;
    }
#pragma omp parallel for schedule(dynamic) num_threads(useful_threads(threads, elements))
    for (int64_t task = 0; task < tasks; ++task) {
        const size_t i = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
        work[i].run(task - first[i]);
    }
    for (Work& one : work) one.finish();
}

}  // namespace hywia
