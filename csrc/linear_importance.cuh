// Scores straight from a linear layer's backward on Hopper: the weight-gradient product with scoring in its epilogue.
//
//   G_s = grad_outputᵀ·input over the tokens of sample s; nothing of it reaches memory.
//
// A block owns tiles of the weight, `m` along the units and `n` along the other dimension. One warp keeps a ring of
// shared-memory stages full by bulk tensor copies; two warpgroups multiply, 64 rows of the tile each. Both operands
// have their tokens in rows, so the tensor cores read them "outer-major" and nothing is transposed.
//
//   whole     128 x 256 tiles, one product over all tokens: first order, signed sums of the mean gradient.
//   samples   128 x 128 tiles, one product per sample; the sum and the sum of squares of the sample gradients stay in
//             registers beside it (3 x 64 of them a thread, which is why the tile is no larger).
//
// At 128 x 128 the operands' traffic from L2 is what limits: 256·T·2 bytes for 2·128·128·T flops are 10 TB/s at
// 650 TFLOP/s. Blocks of a cluster therefore share their operands (multicast): CM blocks one n tile, CN one m tile.
//
// A cluster walks its tiles (LinearPlan says which) and adds its sums to its own rows of `partial`: the order of
// additions is fixed, no two blocks touch one address, and the table stays small however many samples there are.
#pragma once

#include "linear_tiles.cuh"

namespace hywia {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace linear {

// Where this lane's row of four 8x8 matrices of a 128 x 128 weight tile lies, for load_matrices: the warp's 16 rows and
// the 16 columns that go with the accumulator registers 8·j .. 8·j + 7. The swizzle is an exclusive or, so one address
// and constants serve all j.
template <bool columns>
struct WeightAddress {
    uint32_t first;

    __device__ __forceinline__ WeightAddress(uint32_t tile, int group, int warp, int lane) {
        const int matrix = lane / 8, inner = lane % 8;
        if constexpr (columns) {  // memory rows are n, 128 bytes of m each; box `group` holds this warpgroup's 64 m
            const int n = (matrix >> 1) * 8 + inner, chunk = warp * 2 + (matrix & 1);
            first = tile + group * kWeightBoxBytes + n * 128 + ((chunk ^ inner) << 4);
        } else {
            const int m = group * 64 + warp * 16 + (matrix & 1) * 8 + inner, chunk = matrix >> 1;
            first = tile + m * 128 + ((chunk ^ inner) << 4);
        }
    }
    __device__ __forceinline__ uint32_t at(int j) const {
        return columns ? first + j * 2048 : (first ^ ((j % 4) * 32)) + j / 4 * kWeightBoxBytes;
    }
};

__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// One warpgroup. `Ring`s run exactly as the producer's.
template <typename T, bool whole, bool squares, bool signed_sums, bool ragged, bool columns, int CM, int CN>
struct Consumer {
    using Tile = LinearTile<whole, signed_sums>;
    const LinearKernelArgs& p;
    const Shared<Tile>& shared;
    Place<CM, CN> place;
    int group, warp, lane;
    Ring<Tile::kStages> ring;
    Ring<Tile::kWeights ? Tile::kWeights : 1> buffer;
    bool lead;  // `whole`: the first warpgroup has yet to let the second begin

    // Every block that copies into this slot hears of it, from each warp.
    __device__ __forceinline__ void release(int slot) const {
        __syncwarp();
        if constexpr (CM * CN == 1) {
            if (lane == 0) barrier_arrive(shared.empty(slot));
        } else {
            if (lane < Place<CM, CN>::kSharers) barrier_arrive_cluster(shared.empty(slot), place.sharer(lane));
        }
    }

    // Zeroes a stage from token `valid` on: those rows belong to the next sample. Both operands, since that sample's
    // NaN times zero would be NaN here; this warpgroup's part of A, and all of B, which the other zeroes too: it may be
    // a sample behind, and the same value twice is no race.
    __device__ __forceinline__ void mask(int slot, int valid) const {
        const uint32_t a = shared.a(slot) + group * kChunkBytes, b = shared.b(slot);
        for (int word = valid * 8 + warp * 32 + lane; word < kStepK * 8; word += 128) {
            store_zero(a + word * 16);
#pragma unroll
            for (int chunk = 0; chunk < Tile::kN / 64; ++chunk) store_zero(b + chunk * kChunkBytes + word * 16);
        }
        fence_async_proxy();
        group == 0 ? warpgroup_sync<1>() : warpgroup_sync<2>();
    }

    // The two warpgroups take turns at the tensor cores, so that one works on its sums while the other multiplies; left
    // alone they run in step, and the tensor cores idle through both epilogues. A turn ends after at most two stages:
    // the ring holds more, so waiting for a turn cannot starve the other warpgroup of stages. `whole` needs this once:
    // the second warpgroup starts two stages late and stays behind.
    __device__ __forceinline__ void take_turn() const { group == 0 ? named_sync<3>() : named_sync<4>(); }
    __device__ __forceinline__ void pass_turn() const { group == 0 ? named_arrive<4>() : named_arrive<3>(); }
    __device__ __forceinline__ void hand_over() {
        if constexpr (!whole)
            pass_turn();
        else if (lead)
            pass_turn(), lead = false;
    }

    // The product over one stage; `fresh` overwrites d.
    __device__ __forceinline__ void multiply_stage(float (&d)[Tile::kAccumulators], bool fresh) const {
        const uint64_t a = outer_major_descriptor(shared.a(ring.slot) + group * kChunkBytes, kChunkBytes);
        const uint64_t b = outer_major_descriptor(shared.b(ring.slot), kChunkBytes);
        product_begin();
#pragma unroll
        for (int k = 0; k < kStepK / 16; ++k)
            Product<T>::add(d, a + k * kDescriptorStep, b + k * kDescriptorStep, !fresh || k > 0);
        product_commit();
    }

    // The product over tokens [begin, end), at least one, into `d`, which it overwrites.
    __device__ __forceinline__ void multiply(float (&d)[Tile::kAccumulators], int begin, int end) {
        barrier_wait(shared.full(ring.slot), ring.parity);
        if constexpr (!whole) {
            if (end - begin < kStepK) mask(ring.slot, end - begin);
            take_turn();
        }
        multiply_stage(d, true);
        const int second = begin + kStepK;
        if (second >= end) hand_over();
        for (int token = second; token < end; token += kStepK) {
            const int previous = ring.slot;
            ring.advance();
            barrier_wait(shared.full(ring.slot), ring.parity);
            if constexpr (!whole)
                if (end - token < kStepK) mask(ring.slot, end - token);
            multiply_stage(d, false);
            if (token == second) hand_over();
            product_wait<1>();
            release(previous);
        }
        product_wait<0>();
        release(ring.slot);
        ring.advance();
    }

    __device__ __forceinline__ void run(Walk walk) {
        if constexpr (whole)
            run_whole(walk);
        else
            run_samples(walk);
    }

    // Where this lane adds a quantity's sum over one of the warp's rows: of a quad, lane 0 serves row lane/4, lane 1
    // row lane/4 + 8, the others none.
    __device__ __forceinline__ float* slot_of(const Walk& walk) const {
        const int row = (walk.m() * CM + place.m) * kTileM + group * 64 + warp * 16 + lane / 4 + (lane & 1) * 8;
        return p.partial + (walk.lane_n * CN + place.n) * p.plan.rows * p.plan.row_stride + row;
    }
    __device__ __forceinline__ bool writes() const { return (lane & 2) == 0; }
    __device__ __forceinline__ float pick(float upper, float lower) const {  // both quad sums; this lane's row
        upper = quad_sum(upper), lower = quad_sum(lower);
        return lane & 1 ? lower : upper;
    }

    __device__ __forceinline__ void run_whole(Walk walk) {
        float fine[2] = {}, signed_sum[2] = {};
        if (group == 1) take_turn();
        for (; walk.more(); walk.advance()) {
            float d[Tile::kAccumulators];
            multiply(d, 0, p.tokens);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                barrier_wait(shared.full(ring.slot), ring.parity);
                const WeightAddress<columns> weight(shared.a(ring.slot), group, warp, lane);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    uint32_t w[4];
                    load_matrices<columns>(w, weight.at(j));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 pair = unpack<T>(w[i]);
                        const float t0 = d[half * 64 + j * 8 + i * 2] * pair.x;
                        const float t1 = d[half * 64 + j * 8 + i * 2 + 1] * pair.y;
                        fine[i & 1] += fabsf(t0), signed_sum[i & 1] += t0;
                        fine[i & 1] += fabsf(t1), signed_sum[i & 1] += t1;
                    }
                }
                release(ring.slot);
                ring.advance();
            }
            if (walk.last()) {
                const float f = pick(fine[0], fine[1]), s = pick(signed_sum[0], signed_sum[1]);
                float* const slot = slot_of(walk);
                if (writes()) slot[0] = f * p.mean_scale, slot[p.plan.row_stride] = s * p.mean_scale;
                fine[0] = fine[1] = signed_sum[0] = signed_sum[1] = 0.0f;
            }
        }
    }

    // One sample's gradient: into the sums over samples and, against the weight, into signed sums of two rows.
    __device__ __forceinline__ void add_sample(const float (&d)[64], [[maybe_unused]] WeightAddress<columns> weight,
                                               float (&sum)[64], float (&square)[squares ? 64 : 1],
                                               float (&h)[2]) const {
        uint32_t w[2][4];
        if constexpr (signed_sums) load_matrices<columns>(w[0], weight.at(0));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if constexpr (signed_sums)
                if (j < 7) load_matrices<columns>(w[(j + 1) % 2], weight.at(j + 1));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int e = j * 8 + i * 2;
                if constexpr (signed_sums) {
                    const float2 pair = unpack<T>(w[j % 2][i]);
                    h[i & 1] += d[e] * pair.x;
                    h[i & 1] += d[e + 1] * pair.y;
                }
                sum[e] += d[e], sum[e + 1] += d[e + 1];
                if constexpr (squares) square[e] += d[e] * d[e], square[e + 1] += d[e + 1] * d[e + 1];
            }
        }
    }

    // The fine sums of a tile, once all samples are in.
    __device__ __forceinline__ void finish_tile(WeightAddress<columns> weight, const float (&sum)[64],
                                                const float (&square)[squares ? 64 : 1],
                                                float (&fine)[kLinearFineRows][2]) const {
        const float half_square = 0.5f * p.square_scale;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            uint32_t w[4];
            load_matrices<columns>(w, weight.at(j));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpack<T>(w[i]);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float value = k ? pair.y : pair.x;
                    const float t = sum[j * 8 + i * 2 + k] * value;
                    fine[0][i & 1] += fabsf(t);
                    if constexpr (squares) {
                        const float u = square[j * 8 + i * 2 + k] * (value * value);
                        fine[1][i & 1] += u;
                        fine[2][i & 1] += fabsf(t * p.mean_scale - u * half_square);
                    }
                }
            }
        }
        fine[0][0] *= p.mean_scale, fine[0][1] *= p.mean_scale;
        fine[1][0] *= half_square, fine[1][1] *= half_square;
    }

    __device__ __forceinline__ void run_samples(Walk walk) {
        if (group == 1) pass_turn();  // the first turn is the other's
        constexpr int kFirstSigned = squares ? kLinearFineRows : 1;
        for (; walk.more(); walk.advance()) {
            const bool fresh = walk.fresh();
            float* const slot = slot_of(walk);
            float sum[64], square[squares ? 64 : 1];
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                sum[i] = 0.0f;
                if constexpr (squares) square[i] = 0.0f;
            }
            uint32_t tile = 0;
            if constexpr (signed_sums) {
                tile = shared.weight(buffer.slot);
                barrier_wait(shared.weight_full(buffer.slot), buffer.parity);
            }
            float* at = slot + kFirstSigned * p.plan.row_stride;
            for (int s = 0; s < p.samples; ++s, at += p.plan.row_stride) {
                int begin, end;
                sample_range<ragged>(p, s, begin, end);
                float before = 0.0f;  // on its way while the product runs
                if constexpr (signed_sums)
                    if (!fresh && writes()) before = *at;
                float d[64], h[2] = {};
                multiply(d, begin, end);
                add_sample(d, WeightAddress<columns>(tile, group, warp, lane), sum, square, h);
                if constexpr (signed_sums) {
                    const float total = pick(h[0], h[1]);
                    if (writes()) *at = before + total * p.scale;
                }
            }
            if constexpr (!signed_sums) {
                tile = shared.a(ring.slot);
                barrier_wait(shared.full(ring.slot), ring.parity);
            }
            float fine[kLinearFineRows][2] = {};
            finish_tile(WeightAddress<columns>(tile, group, warp, lane), sum, square, fine);
            if constexpr (signed_sums) {
                __syncwarp();
                if (lane == 0) barrier_arrive(shared.weight_empty(buffer.slot));
                buffer.advance();
            } else {
                release(ring.slot);
                ring.advance();
            }
#pragma unroll
            for (int q = 0; q < (squares ? kLinearFineRows : 1); ++q) {
                const float total = pick(fine[q][0], fine[q][1]);
                float* const to = slot + q * p.plan.row_stride;
                if (writes()) *to = (fresh ? 0.0f : *to) + total;
            }
        }
        if (group == 0) take_turn();  // the other's last pass
    }
};

}  // namespace linear

#endif

template <typename T, bool whole, bool squares, bool signed_sums, bool ragged, bool columns, int CM, int CN>
__global__ void __launch_bounds__(kLinearThreads, 1)
    linear_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                  const __grid_constant__ CUtensorMap map_w, const __grid_constant__ LinearKernelArgs p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace linear;
    using Tile = LinearTile<whole, signed_sums>;
    extern __shared__ uint8_t dynamic[];
    const Shared<Tile> shared(shared_address(dynamic));
    const Place<CM, CN> place(CM * CN == 1 ? 0 : int(cluster_rank()));
    if (threadIdx.x == 0) {
        prefetch_map(&map_a), prefetch_map(&map_b), prefetch_map(&map_w);
        for (int i = 0; i < Tile::kStages; ++i) {
            barrier_init(shared.full(i), 1);
            barrier_init(shared.empty(i), kConsumers * 4 * Place<CM, CN>::kSharers);
        }
        for (int i = 0; i < Tile::kWeights; ++i) {
            barrier_init(shared.weight_full(i), 1);
            barrier_init(shared.weight_empty(i), kConsumers * 4);
        }
        fence_barrier_init();
    }
    if constexpr (CM * CN > 1)
        cluster_sync();
    else
        __syncthreads();
    const Walk walk(p.plan, blockIdx.x / (CM * CN));
    if (threadIdx.x < 128) {
        give_registers_up<40>();
        if (threadIdx.x == 0)
            produce<whole, signed_sums, ragged, columns, CM, CN>(p, &map_a, &map_b, &map_w, shared, place, walk);
    } else {
        take_registers<232>();
        const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128 - 1, 0);  // known to be one for the warp
        Consumer<T, whole, squares, signed_sums, ragged, columns, CM, CN> consumer{
            p, shared, place, group, int(threadIdx.x) / 32 % 4, int(threadIdx.x) % 32, {}, {}, group == 0};
        consumer.run(walk);
    }
    // A block must not leave while another may still copy into it or arrive at its barriers.
    if constexpr (CM * CN > 1) cluster_sync();
#endif
}

template <typename T, bool whole, bool squares, bool signed_sums, bool ragged, bool columns>
LinearKernel describe_kernel(int index) {
    using Tile = LinearTile<whole, signed_sums>;
    constexpr int CM = 2, CN = 1;  // of 1x1, 2x1, 1x2 and 2x2 blocks, the fastest or level on an H100
    return {reinterpret_cast<const void*>(linear_kernel<T, whole, squares, signed_sums, ragged, columns, CM, CN>),
            kTileM,
            Tile::kN,
            CM,
            CN,
            kLinearThreads,
            Tile::kSharedBytes,
            index};
}

template <typename T, bool columns>
const LinearKernel& kernel_for(LinearMode mode, bool ragged, int index) {
    static const LinearKernel kernels[] = {
        describe_kernel<T, true, false, false, false, columns>(index),
        describe_kernel<T, false, false, true, false, columns>(index + 1),
        describe_kernel<T, false, false, true, true, columns>(index + 2),
        describe_kernel<T, false, true, true, false, columns>(index + 3),
        describe_kernel<T, false, true, true, true, columns>(index + 4),
        describe_kernel<T, false, true, false, false, columns>(index + 5),
        describe_kernel<T, false, true, false, true, columns>(index + 6),
    };
    return mode == LinearMode::Whole ? kernels[0] : kernels[2 * int(mode) - 1 + ragged];
}

}  // namespace hywia
