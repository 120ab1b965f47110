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

#include "hopper.cuh"
#include "linear_importance_cuda.h"

namespace hywia {

#ifdef HYWIA_EVICT_LAST
constexpr uint64_t kOperands = hopper::kEvictLast;
#else
constexpr uint64_t kOperands = hopper::kEvictNormal;
#endif
constexpr int kTileM = 128, kStepK = kLinearStepTokens;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kLinearThreads = 128 * (kConsumers + 1);
constexpr uint32_t kChunkBytes = kStepK * 128;    // 64 elements by 64 tokens
constexpr uint32_t kWeightBytes = 128 * 128 * 2;  // a 128 x 128 tile: two boxes of 64 x 128
constexpr uint32_t kWeightBoxBytes = kWeightBytes / 2;

template <bool whole>
struct LinearTile {
    static constexpr int kN = whole ? 256 : 128;
#ifdef HYWIA_W1
    static constexpr int kStages = whole ? 4 : 6;
    static constexpr int kWeights = whole ? 0 : 1;
#else
    static constexpr int kStages = whole ? 4 : 5;
    static constexpr int kWeights = whole ? 0 : 2;
#endif
    // buffers of weight tiles; `whole` sends them through the stages
    static constexpr int kAccumulators = kN / 2;
    static constexpr uint32_t kABytes = kTileM * kStepK * 2, kBBytes = kN * kStepK * 2;
    static constexpr uint32_t kStageBytes = kABytes + kBBytes;
    static constexpr uint32_t kBarriers = 2 * kStages + 2 * (kWeights ? kWeights : 1);
    static constexpr uint32_t kSharedBytes = kStages * kStageBytes + kWeights * kWeightBytes + kBarriers * 8 + 1024;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace linear {

using namespace hopper;

// A position in a ring of `size` slots: which slot, and the parity of its phase.
template <int size>
struct Ring {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == size) slot = 0, parity ^= 1;
    }
};

// Shared-memory addresses of one block.
template <bool whole>
struct Shared {
    using Tile = LinearTile<whole>;
    uint32_t base, barriers;
    __device__ __forceinline__ explicit Shared(uint32_t dynamic)
        : base((dynamic + 1023) & ~1023u),
          barriers(base + Tile::kStages * Tile::kStageBytes + Tile::kWeights * kWeightBytes) {}
    __device__ __forceinline__ uint32_t a(int slot) const { return base + slot * Tile::kStageBytes; }
    __device__ __forceinline__ uint32_t b(int slot) const { return a(slot) + Tile::kABytes; }
    __device__ __forceinline__ uint32_t weight(int buffer) const {
        return base + Tile::kStages * Tile::kStageBytes + buffer * kWeightBytes;
    }
    __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 8 * slot; }
    __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 8 * (Tile::kStages + slot); }
    __device__ __forceinline__ uint32_t weight_full(int buffer) const {
        return barriers + 8 * (2 * Tile::kStages + buffer);
    }
    __device__ __forceinline__ uint32_t weight_empty(int buffer) const {
        return barriers + 8 * (2 * Tile::kStages + Tile::kWeights + buffer);
    }
};

// This block's place in its cluster, and whom it shares operands with.
template <int CM, int CN>
struct Place {
    int m, n;
    __device__ __forceinline__ explicit Place(int rank) : m(rank % CM), n(rank / CM) {}
    __device__ __forceinline__ uint16_t same_m() const {  // blocks that read the same grad_output columns
        uint16_t mask = 0;
        for (int i = 0; i < CN; ++i) mask |= uint16_t(1) << (i * CM + m);
        return mask;
    }
    __device__ __forceinline__ uint16_t same_n() const {
        uint16_t mask = 0;
        for (int i = 0; i < CM; ++i) mask |= uint16_t(1) << (n * CM + i);
        return mask;
    }
    // Blocks whose copies land in this block's stages: itself, those of one m and those of one n.
    static constexpr int kSharers = CM + CN - 1;
    __device__ __forceinline__ int sharer(int i) const { return i < CN ? i * CM + m : n * CM + (m + i - CN + 1) % CM; }
};

// The tiles of one cluster, in order.
struct Walk {
    const LinearPlan& plan;
    int lane_m, lane_n, step;  // `step` counts n tiles over all groups

    __device__ __forceinline__ Walk(const LinearPlan& p, int cluster)
        : plan(p), lane_m(cluster % p.across), lane_n(cluster / p.across), step(lane_n) {}
    __device__ __forceinline__ int m() const { return step / plan.n_tiles * plan.across + lane_m; }
    __device__ __forceinline__ int n() const { return step % plan.n_tiles; }
    // Only the last group may be short of m tiles.
    __device__ __forceinline__ bool more() const { return step < plan.groups * plan.n_tiles && m() < plan.m_tiles; }
    __device__ __forceinline__ bool fresh() const { return n() < plan.share; }                 // first of its m tile
    __device__ __forceinline__ bool last() const { return n() + plan.share >= plan.n_tiles; }  // and last
    __device__ __forceinline__ void advance() { step += plan.share; }
};

// Tokens of sample `s`.
template <bool ragged>
__device__ __forceinline__ void sample_range(const LinearKernelArgs& p, int s, int& begin, int& end) {
    if constexpr (ragged) {
        begin = __ldg(p.offsets + s), end = __ldg(p.offsets + s + 1);
    } else {
        begin = s * p.length, end = begin + p.length;
    }
}

// A 128 x 128 piece of the weight as two boxes: [128 m][64 n] twice, or [128 n][64 m] twice when units are columns.
template <bool columns>
__device__ __forceinline__ void copy_weight(uint32_t to, const CUtensorMap* map, int m, int n, uint32_t barrier) {
    for (int i = 0; i < 2; ++i) {
        if constexpr (columns)
            copy_box(to + i * kWeightBoxBytes, map, m + i * 64, n, barrier, kEvictFirst);
        else
            copy_box(to + i * kWeightBoxBytes, map, n + i * 64, m, barrier, kEvictFirst);
    }
}

template <bool whole, bool ragged, bool columns, int CM, int CN>
__device__ void produce(const LinearKernelArgs& p, const CUtensorMap* map_a, const CUtensorMap* map_b,
                        const CUtensorMap* map_w, const Shared<whole>& shared, Place<CM, CN> place, Walk walk) {
    using Tile = LinearTile<whole>;
    constexpr int kAChunks = kTileM / 64 / CN, kBChunks = Tile::kN / 64 / CM;  // this block's part of each operand
    Ring<Tile::kStages> ring;
    Ring<Tile::kWeights ? Tile::kWeights : 1> buffer;
    const uint16_t same_m = place.same_m(), same_n = place.same_n();
    for (; walk.more(); walk.advance()) {
        const int m = (walk.m() * CM + place.m) * kTileM, n = (walk.n() * CN + place.n) * Tile::kN;
        if constexpr (!whole) {
            barrier_wait(shared.weight_empty(buffer.slot), buffer.parity ^ 1);
            barrier_expect(shared.weight_full(buffer.slot), kWeightBytes);
            copy_weight<columns>(shared.weight(buffer.slot), map_w, m, n, shared.weight_full(buffer.slot));
            buffer.advance();
        }
        for (int s = 0; s < (whole ? 1 : p.samples); ++s) {
            int begin = 0, end = p.tokens;
            if constexpr (!whole) sample_range<ragged>(p, s, begin, end);
            for (int token = begin; token < end; token += kStepK) {
                barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
                const uint32_t full = shared.full(ring.slot);
                barrier_expect(full, Tile::kStageBytes);
                for (int i = 0; i < kAChunks; ++i) {
                    const int chunk = CN == 1 ? i : place.n * kAChunks + i;
                    const uint32_t to = shared.a(ring.slot) + chunk * kChunkBytes;
                    if constexpr (CN == 1)
                        copy_box(to, map_a, m + chunk * 64, token, full, kOperands);
                    else
                        copy_box_multicast(to, map_a, m + chunk * 64, token, full, same_m, kOperands);
                }
                for (int i = 0; i < kBChunks; ++i) {
                    const int chunk = CM == 1 ? i : place.m * kBChunks + i;
                    const uint32_t to = shared.b(ring.slot) + chunk * kChunkBytes;
                    if constexpr (CM == 1)
                        copy_box(to, map_b, n + chunk * 64, token, full, kOperands);
                    else
                        copy_box_multicast(to, map_b, n + chunk * 64, token, full, same_n, kOperands);
                }
                ring.advance();
            }
        }
        if constexpr (whole) {  // the weight's tile follows in two stages
            for (int half = 0; half < 2; ++half) {
                barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
                barrier_expect(shared.full(ring.slot), kWeightBytes);
                copy_weight<columns>(shared.a(ring.slot), map_w, m, n + half * 128, shared.full(ring.slot));
                ring.advance();
            }
        }
    }
}

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
template <typename T, bool whole, bool squares, bool ragged, bool columns, int CM, int CN>
struct Consumer {
    using Tile = LinearTile<whole>;
    const LinearKernelArgs& p;
    const Shared<whole>& shared;
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

    // Zeroes this warpgroup's rows of a stage from token `valid` on: they belong to the next sample.
    __device__ __forceinline__ void mask(int slot, int valid) const {
        const uint32_t chunk = shared.a(slot) + group * kChunkBytes;
        for (int word = valid * 8 + warp * 32 + lane; word < kStepK * 8; word += 128)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(chunk + word * 16), "r"(0) : "memory");
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
            const WeightAddress<columns> weight(shared.weight(buffer.slot), group, warp, lane);
            barrier_wait(shared.weight_full(buffer.slot), buffer.parity);
            float* at = slot + kFirstSigned * p.plan.row_stride;
            for (int s = 0; s < p.samples; ++s, at += p.plan.row_stride) {
                int begin, end;
                sample_range<ragged>(p, s, begin, end);
                const float before = fresh || !writes() ? 0.0f : *at;  // on its way while the product runs
                float d[64];
                multiply(d, begin, end);
                float h[2] = {};
                uint32_t w[2][4];
                load_matrices<columns>(w[0], weight.at(0));
#ifdef HYWIA_NO_EPILOGUE
                h[0] += d[0], h[1] += d[63], sum[0] += d[0];
#pragma unroll
                for (int j = 0; j < 0; ++j) {
#else
#pragma unroll
                for (int j = 0; j < 8; ++j) {
#endif
                    if (j < 7) load_matrices<columns>(w[(j + 1) % 2], weight.at(j + 1));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 pair = unpack<T>(w[j % 2][i]);
                        const int e = j * 8 + i * 2;
                        h[i & 1] += d[e] * pair.x;
                        h[i & 1] += d[e + 1] * pair.y;
                        sum[e] += d[e], sum[e + 1] += d[e + 1];
                        if constexpr (squares) square[e] += d[e] * d[e], square[e + 1] += d[e + 1] * d[e + 1];
                    }
                }
                const float total = pick(h[0], h[1]);
                if (writes()) *at = before + total * p.scale;
            }
            float fine[kLinearFineRows][2] = {};
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
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.weight_empty(buffer.slot));
            buffer.advance();
#pragma unroll
            for (int q = 0; q < (squares ? kLinearFineRows : 1); ++q) {
                const float total = pick(fine[q][0], fine[q][1]);
                float* const at = slot + q * p.plan.row_stride;
                if (writes()) *at = (fresh ? 0.0f : *at) + total;
            }
        }
        if (group == 0) take_turn();  // the other's last pass
    }
};

}  // namespace linear

#endif

template <typename T, bool whole, bool squares, bool ragged, bool columns, int CM, int CN>
__global__ void __launch_bounds__(kLinearThreads, 1)
    linear_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                  const __grid_constant__ CUtensorMap map_w, const __grid_constant__ LinearKernelArgs p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace linear;
    using Tile = LinearTile<whole>;
    extern __shared__ uint8_t dynamic[];
    const Shared<whole> shared(shared_address(dynamic));
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
        if (threadIdx.x == 0) produce<whole, ragged, columns, CM, CN>(p, &map_a, &map_b, &map_w, shared, place, walk);
    } else {
        take_registers<232>();
        const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128 - 1, 0);  // known to be one for the warp
        Consumer<T, whole, squares, ragged, columns, CM, CN> consumer{
            p, shared, place, group, int(threadIdx.x) / 32 % 4, int(threadIdx.x) % 32, {}, {}, group == 0};
        consumer.run(walk);
    }
    // A block must not leave while another may still copy into it or arrive at its barriers.
    if constexpr (CM * CN > 1) cluster_sync();
#endif
}

// The shape of clusters that measured best on an H100.
#ifndef HYWIA_CM
#define HYWIA_CM 2
#define HYWIA_CN 1
#endif

template <typename T, bool whole, bool squares, bool ragged, bool columns, int CM, int CN>
LinearKernel describe_kernel(int index) {
    using Tile = LinearTile<whole>;
    return {reinterpret_cast<const void*>(linear_kernel<T, whole, squares, ragged, columns, CM, CN>),
            kTileM,
            Tile::kN,
            CM,
            CN,
            kLinearThreads,
            Tile::kSharedBytes,
            index};
}

// `index`: of the first of this type's ten kernels.
template <typename T>
const LinearKernel& kernel_for(const LinearVariant& v, int index) {
    static const LinearKernel whole[] = {describe_kernel<T, true, false, false, false, 2, 1>(index),
                                         describe_kernel<T, true, false, false, true, 2, 1>(index + 1)};
    static const LinearKernel samples[] = {
        describe_kernel<T, false, false, false, false, HYWIA_CM, HYWIA_CN>(index + 2),
        describe_kernel<T, false, false, false, true, HYWIA_CM, HYWIA_CN>(index + 3),
        describe_kernel<T, false, false, true, false, HYWIA_CM, HYWIA_CN>(index + 4),
        describe_kernel<T, false, false, true, true, HYWIA_CM, HYWIA_CN>(index + 5),
        describe_kernel<T, false, true, false, false, HYWIA_CM, HYWIA_CN>(index + 6),
        describe_kernel<T, false, true, false, true, HYWIA_CM, HYWIA_CN>(index + 7),
        describe_kernel<T, false, true, true, false, HYWIA_CM, HYWIA_CN>(index + 8),
        describe_kernel<T, false, true, true, true, HYWIA_CM, HYWIA_CN>(index + 9),
    };
    return v.whole ? whole[v.columns] : samples[4 * v.squares + 2 * v.ragged + v.columns];
}

}  // namespace hywia
