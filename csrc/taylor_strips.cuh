// Taylor importance of columns on the GPU, in one launch. Instantiated through taylor_launch.cuh.
//
// A block owns a strip of columns, 256 bytes side by side, and a piece of the reduction. All blocks fit on the GPU at
// once, with equal shares: they start and end together, and memory is busy in between. Each leaves its sums in the
// workspace and counts itself; the last block of a strip adds what all left, in the order of the pieces. So the same
// input gives the same bits whichever block is last, and no second kernel waits for the slowest block of the first.
#pragma once

#include "taylor_importance.cuh"

namespace hywia {

constexpr int kStripThreads = 512;
constexpr int kStripWarps = kStripThreads / 32;
constexpr int kStripLanes = 16;  // 16-byte words side by side
constexpr int kStripRows = kStripThreads / kStripLanes;
constexpr int kStripBlocksPerSM = 2;

// Adds one and returns what was there. Releases what the block wrote before its last barrier, and acquires what the
// blocks counted before wrote: both reach the block's other threads through its barriers.
__device__ __forceinline__ unsigned count_block(unsigned* counter) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

template <Order order, typename W, typename G, typename F, int count>
__global__ void __launch_bounds__(kStripThreads, kStripBlocksPerSM)
    taylor_strips(const __grid_constant__ TaylorKernelArgs a) {
    constexpr int kUnroll = Unroll<W, G, F, count>::kSteps, kColumns = kStripLanes * count;
    allow_finish_launch();
    const int pieces = int(a.plan.pieces), lane = threadIdx.x % kStripLanes, row = threadIdx.x / kStripLanes;
    // Neighbouring blocks take neighbouring strips of the same rows: they read lines of memory that lie together.
    const unsigned strips = unsigned(a.plan.strip_count);
    const int64_t strip = blockIdx.x % strips, piece = blockIdx.x / strips;
    const int64_t unit = strip * kColumns + lane * count;
    const int64_t begin = piece * a.plan.length + min(piece, a.plan.longer);
    const int64_t end = unit < a.op.units ? begin + a.plan.length + (piece < a.plan.longer) : begin;

    float fine[count] = {}, signed_sum[count] = {};
    for (int64_t at = begin + row; at < end; at += kStripRows * kUnroll) {
        Step<order, Along::Units, W, G, F, count> step[kUnroll];
        load_steps(step, a.op, unit, at, kStripRows, end);
        add_columns(step, a.op, fine, signed_sum);
    }

    // Over the two rows of a warp by shuffles, over the warps through shared memory.
    __shared__ __align__(16) float shared[kStripWarps][2][kColumns];
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        fine[i] = warp_sum(fine[i], kStripLanes, 32);
        signed_sum[i] = warp_sum(signed_sum[i], kStripLanes, 32);
    }
    if (threadIdx.x % 32 < kStripLanes) {
#pragma unroll
        for (int i = 0; i < count; i += 4) {
            auto* to = reinterpret_cast<float4*>(&shared[warp][0][lane * count + i]);
            to[0] = make_float4(fine[i], fine[i + 1], fine[i + 2], fine[i + 3]);
            to[kColumns / 4] = make_float4(signed_sum[i], signed_sum[i + 1], signed_sum[i + 2], signed_sum[i + 3]);
        }
    }
    __syncthreads();
    __shared__ __align__(16) float sums[2 * kColumns];  // fine, then signed
    float total = 0.0f;
    if (threadIdx.x < 2 * kColumns) {
#pragma unroll
        for (int w = 0; w < kStripWarps; ++w) total += (&shared[w][0][0])[threadIdx.x];
    }
    if (pieces == 1) {
        if (threadIdx.x < 2 * kColumns) sums[threadIdx.x] = total;
    } else {
        float* partial = a.partial + strip * pieces * 2 * kColumns;
        if (threadIdx.x < 2 * kColumns) __stcg(partial + piece * 2 * kColumns + threadIdx.x, total);
        __shared__ bool last;
        __syncthreads();
        if (threadIdx.x == 0) {
            last = count_block(a.op.counters + strip) == unsigned(pieces) - 1;
            if (last) a.op.counters[strip] = 0;  // for the next launch
        }
        __syncthreads();
        if (!last) return;
        constexpr int kQuads = 2 * kColumns / 4, kParts = kStripThreads / kQuads;
        const int quad = threadIdx.x % kQuads, part = threadIdx.x / kQuads;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int p = part; p < pieces; p += kParts) {
            const float4 more = __ldcg(reinterpret_cast<const float4*>(partial) + int64_t(p) * kQuads + quad);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        auto* parts = reinterpret_cast<float4*>(shared);  // what it held was read before the barriers above
        parts[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x < kQuads) {
#pragma unroll
            for (int p = 1; p < kParts; ++p) {
                const float4 more = parts[p * kQuads + threadIdx.x];
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            reinterpret_cast<float4*>(sums)[threadIdx.x] = sum;
        }
    }
    __syncthreads();
    // `fold` columns make one output; it divides the strip.
    const int fold = a.plan.fold, outputs = kColumns / fold;
    const int64_t first = strip * outputs, limit = a.op.units / fold;
    if (fold == 1) {
        const int kind = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
        if (kind < 2 && first + column < limit) {
            float* out = (kind ? a.signed_sum : a.fine) + first + column;
            *out = a.accumulate ? *out + sums[threadIdx.x] : sums[threadIdx.x];
        }
        return;
    }
    for (int i = warp; i < 2 * outputs; i += kStripWarps) {
        const int kind = i / outputs, output = i % outputs;
        float folded = 0.0f;
        for (int c = threadIdx.x % 32; c < fold; c += 32) folded += sums[kind * kColumns + output * fold + c];
        folded = warp_sum(folded, 1, 32);
        if (threadIdx.x % 32 == 0 && first + output < limit) {
            float* out = (kind ? a.signed_sum : a.fine) + first + output;
            *out = a.accumulate ? *out + folded : folded;
        }
    }
}

}  // namespace hywia
