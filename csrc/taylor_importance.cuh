// Taylor importance on the GPU: the kernels, and how the work is cut. Instantiated through taylor_launch.cuh.
//
// The op reads each operand once and does a handful of flops per element, so it runs at the memory's speed or it is
// wrong. An H200 SM must have some 40 KB of loads outstanding to hide 700 ns at 4.8 TB/s; each thread here asks for
// about eight 16-byte words before it uses the first, 128 bytes x 1024 threads = 131 KB per SM.
//
// The operands are views [units, reduce].
//   rows     `reduce` is contiguous: a block per row (taylor_whole_rows); where rows are short, few or very long, a
//   team
//            of up to 32 lanes owns a piece of one row (taylor_rows).
//   columns  `units` is contiguous: blocks own a strip of units and a piece of the reduction, and the last block of a
//            strip adds the pieces (taylor_strips.cuh); taylor_columns leaves that to `finish`.
// `finish` adds what pieces are left, and the group's members, in a fixed order. No float is added atomically, so the
// same input gives the same bits. When one team covers a unit, it writes the result itself.
//
// Layouts that cannot be read in 16-byte words run the same kernels with vectors of one element of type AnyType.
#pragma once

#include "common.cuh"

namespace hywia {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSM = 4;         // 64 registers per thread
constexpr int kWordsInFlight = 8;       // 16-byte loads that a thread issues before it uses the first
constexpr int64_t kLongestChain = 128;  // float32 additions in a row, so that a sum keeps six digits

// How one call is cut; depends on the sizes and the device alone.
struct TaylorPlan {
    bool rows = true;         // the row kernel, else the column kernel
    bool whole_rows = false;  // a block per row
    bool strips = false;      // the kernel of taylor_strips.cuh
    int64_t strip_count = 0;
    int64_t longer = 0;    // pieces of `strips` that are one longer than `length`
    int fold = 1;          // columns that `strips` adds up to one output
    bool vectors = false;  // 16-byte words
    int lanes = 32;        // lanes along the contiguous dimension
    int64_t pieces = 1;    // of the reduction
    int64_t length = 0;    // of a piece
    int64_t blocks = 0;
    bool direct() const { return pieces == 1; }
};

// Of anything with the operands `weight`, `grad` and `fisher`.
template <typename Args, typename Predicate>
bool all_operands(const Args& a, Predicate predicate) {
    for (const Operand* x : {&a.weight, &a.grad, &a.fisher})
        if (x->data && !predicate(*x)) return false;
    return true;
}

// Whether every line of an operand starts at a 16-byte word.
inline bool aligned(const Operand& x, int64_t stride) {
    const int64_t size = x.dtype == DType::Float32 ? 4 : 2;
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && stride * size % 16 == 0;
}

struct TaylorKernelArgs {
    TaylorImportanceArgs op;
    TaylorPlan plan;
    float* fine;        // partial sums: [units, pieces] from rows, [pieces, units] from columns,
    float* signed_sum;  // or the outputs themselves
    float* partial;     // what the blocks of `strips` leave: [strips, pieces, 2, columns of a strip]
    bool accumulate;    // only where these are the outputs
};

template <Order order>
__device__ __forceinline__ float term(float w, float g, float f) {
    if constexpr (order == Order::First) return g * w;
    if constexpr (order == Order::Second) return 0.5f * f * w * w;
    return g * w - 0.5f * f * w * w;
}

constexpr int kRowThreads = 512;  // of a block that sums one whole row

enum class Along { Reduce, Units };  // the dimension in which a vector's elements follow each other

template <Along along, int count>
__device__ __forceinline__ int64_t offset_of(const Operand& x, int64_t unit, int64_t position) {
    // A plan with vectors has checked that this stride is one; saying so saves registers.
    const int64_t unit_stride = count > 1 && along == Along::Units ? 1 : x.unit_stride;
    const int64_t reduce_stride = count > 1 && along == Along::Reduce ? 1 : x.reduce_stride;
    return unit * unit_stride + position * reduce_stride;
}

// One step of a thread: `count` consecutive elements of every operand.
template <Order order, Along along, typename W, typename G, typename F, int count>
struct Step {
    Vector<W, count> w;
    Vector<G, count> g;
    Vector<F, count> f;

    template <typename Op>  // anything with the operands `weight`, `grad` and `fisher`
    __device__ __forceinline__ void load(const Op& op, int64_t unit, int64_t position) {
        w.load(op.weight.data, offset_of<along, count>(op.weight, unit, position), op.weight.dtype);
        g.load(op.grad.data, offset_of<along, count>(op.grad, unit, position), op.grad.dtype);
        f.load(op.fisher.data, offset_of<along, count>(op.fisher, unit, position), op.fisher.dtype);
    }
    __device__ __forceinline__ void clear() { w.clear(), g.clear(), f.clear(); }
    template <typename Op>
    __device__ __forceinline__ float get(const Op& op, int i) const {
        return term<order>(w.get(i, op.weight.dtype), g.get(i, op.grad.dtype), f.get(i, op.fisher.dtype));
    }
    template <typename Op>
    __device__ __forceinline__ void add_to(const Op& op, float& fine, float& signed_sum) const {
        float step_fine = 0.0f, step_signed = 0.0f;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float t = get(op, i);
            step_fine += fabsf(t);
            step_signed += t;
        }
        fine += step_fine;
        signed_sum += step_signed;
    }
};

// Steps from position `at` on, `stride` apart; those behind `end` are empty. All are loaded before the first is used.
template <typename S, int unroll, typename Op, typename Stride>
__device__ __forceinline__ void load_steps(S (&step)[unroll], const Op& op, int64_t unit, int64_t at, Stride stride,
                                           int64_t end) {
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
        const int64_t position = at + u * stride;
        if (position < end)
            step[u].load(op, unit, position);
        else
            step[u].clear();
    }
}

// The terms of `count` neighbouring columns, each to its own sums.
template <typename S, int unroll, typename Op, int count>
__device__ __forceinline__ void add_columns(const S (&step)[unroll], const Op& op, float (&fine)[count],
                                            float (&signed_sum)[count]) {
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float t = step[u].get(op, i);
            fine[i] += fabsf(t);
            signed_sum[i] += t;
        }
    }
}

// Steps that a thread loads before it uses the first.
template <typename W, typename G, typename F, int count>
struct Unroll {
    static constexpr int kWords = Vector<W, count>::kWords + Vector<G, count>::kWords + Vector<F, count>::kWords;
    static constexpr int kSteps = kWords < 4 ? kWordsInFlight / kWords : 1;  // two of four words or more would spill
};
template <typename W, typename G, typename F>
struct Unroll<W, G, F, 1> {
    static constexpr int kSteps = kWordsInFlight;
};

// Blocks of taylor_whole_rows on an SM: as many as the registers of the loads in flight leave room for.
template <typename W, typename G, typename F, int count, int unroll>
struct RowBlocks {
    static constexpr int kWords = unroll * Unroll<W, G, F, count>::kWords;
    static constexpr int kPerSM = kWords <= 3 ? 4 : kWords <= 5 ? 3 : 2;
};

// Lets a dependent `finish` be launched while the last blocks run; it still waits for their writes.
__device__ __forceinline__ void allow_finish_launch() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <Order order, typename W, typename G, typename F, int count>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) taylor_rows(const __grid_constant__ TaylorKernelArgs a) {
    constexpr int kUnroll = Unroll<W, G, F, count>::kSteps;
    allow_finish_launch();
    const int lanes = a.plan.lanes, lane = threadIdx.x % lanes;
    const int64_t team = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
    const int64_t unit = team / a.plan.pieces, piece = team - unit * a.plan.pieces;
    const bool active = unit < a.op.units;
    const int64_t begin = piece * a.plan.length;
    const int64_t end = active ? min(a.op.reduce, begin + a.plan.length) : begin;  // idle teams still join shuffles
    const int stride = lanes * count;

    float fine = 0.0f, signed_sum = 0.0f;
    for (int64_t at = begin + lane * count; at < end; at += int64_t(stride) * kUnroll) {
        Step<order, Along::Reduce, W, G, F, count> step[kUnroll];
        load_steps(step, a.op, unit, at, stride, end);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) step[u].add_to(a.op, fine, signed_sum);
    }
    fine = warp_sum(fine, 1, lanes);
    signed_sum = warp_sum(signed_sum, 1, lanes);
    if (active && lane == 0) {
        const int64_t slot = unit * a.plan.pieces + piece;
        a.fine[slot] = a.accumulate ? a.fine[slot] + fine : fine;
        a.signed_sum[slot] = a.accumulate ? a.signed_sum[slot] + signed_sum : signed_sum;
    }
}

// One block per row, for rows long enough to keep it busy. Rows are read in the order in which they lie, and the last
// blocks to run are as short as the first: a warp per row leaves most of the GPU idle at the end.
template <Order order, typename W, typename G, typename F, int count, int unroll>
__global__ void __launch_bounds__(kRowThreads, RowBlocks<W, G, F, count, unroll>::kPerSM)
    taylor_whole_rows(const __grid_constant__ TaylorKernelArgs a) {
    allow_finish_launch();
    const int64_t unit = blockIdx.x;
    constexpr int kStride = kRowThreads * count;
    float fine = 0.0f, signed_sum = 0.0f;
    for (int64_t at = threadIdx.x * count; at < a.op.reduce; at += unroll * kStride) {
        Step<order, Along::Reduce, W, G, F, count> step[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            if (at + u * kStride < a.op.reduce)
                step[u].load(a.op, unit, at + u * kStride);
            else
                step[u].clear();
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u) step[u].add_to(a.op, fine, signed_sum);
    }
    __shared__ float shared[2][kRowThreads / 32];
    fine = warp_sum(fine, 1, 32), signed_sum = warp_sum(signed_sum, 1, 32);
    if (threadIdx.x % 32 == 0) shared[0][threadIdx.x / 32] = fine, shared[1][threadIdx.x / 32] = signed_sum;
    __syncthreads();
    if (threadIdx.x < 2) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kRowThreads / 32; ++w) total += shared[threadIdx.x][w];
        float* out = (threadIdx.x ? a.signed_sum : a.fine) + unit;
        *out = a.accumulate ? *out + total : total;
    }
}

template <Order order, typename W, typename G, typename F, int count>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) taylor_columns(const __grid_constant__ TaylorKernelArgs a) {
    constexpr int kUnroll = Unroll<W, G, F, count>::kSteps;
    allow_finish_launch();
    const int lanes = a.plan.lanes, lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
    const int strip = lanes * count, stride = kThreads / lanes;
    const int64_t piece = blockIdx.x % a.plan.pieces, first = blockIdx.x / a.plan.pieces * strip;
    const int64_t unit = first + lane * count;
    const int64_t begin = piece * a.plan.length;
    const int64_t end = unit < a.op.units ? min(a.op.reduce, begin + a.plan.length) : begin;

    float fine[count] = {}, signed_sum[count] = {};
    for (int64_t at = begin + row; at < end; at += int64_t(stride) * kUnroll) {
        Step<order, Along::Units, W, G, F, count> step[kUnroll];
        load_steps(step, a.op, unit, at, stride, end);
        add_columns(step, a.op, fine, signed_sum);
    }
    // Over the rows that share a warp by shuffles, over the warps through shared memory.
    __shared__ float shared[2][kWarps][32 * count];
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const float f = warp_sum(fine[i], lanes, 32), s = warp_sum(signed_sum[i], lanes, 32);
        if (threadIdx.x % 32 < lanes) {
            shared[0][warp][lane * count + i] = f;
            shared[1][warp][lane * count + i] = s;
        }
    }
    __syncthreads();
    if (threadIdx.x < strip && first + threadIdx.x < a.op.units) {
        float f = 0.0f, s = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            f += shared[0][w][threadIdx.x];
            s += shared[1][w][threadIdx.x];
        }
        const int64_t slot = piece * a.op.units + first + threadIdx.x;
        a.fine[slot] = a.accumulate ? a.fine[slot] + f : f;
        a.signed_sum[slot] = a.accumulate ? a.signed_sum[slot] + s : s;
    }
}

}  // namespace hywia
