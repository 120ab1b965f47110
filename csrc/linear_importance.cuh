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
// A cluster walks a run of consecutive tiles, n fastest, and adds its sums to its own rows of `partial`: the order of
// additions is fixed, no two blocks touch one address, and the table stays small however many samples there are.
#pragma once

#include "hopper.cuh"
#include "linear_importance_cuda.h"

namespace hywia {

constexpr int kTileM = 128, kStepK = kLinearStepTokens;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kLinearThreads = 128 * (kConsumers + 1);
constexpr uint32_t kChunkBytes = kStepK * 128;    // 64 elements by 64 tokens
constexpr uint32_t kWeightBytes = 128 * 128 * 2;  // a 128 x 128 tile: two boxes of 64 x 128
constexpr uint32_t kWeightBoxBytes = kWeightBytes / 2;

template <bool whole>
struct LinearTile {
    static constexpr int kN = whole ? 256 : 128;
    static constexpr int kStages = whole ? 4 : 5;
    static constexpr int kWeights = whole ? 0 : 2;  // buffers of weight tiles; `whole` sends them through the stages
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

// Tokens of sample `s`.
__device__ __forceinline__ void sample_range(const LinearKernelArgs& p, int s, int& begin, int& end) {
    if (p.offsets) {
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

template <bool whole, bool columns, int CM, int CN>
__device__ void produce(const LinearKernelArgs& p, const CUtensorMap* map_a, const CUtensorMap* map_b,
                        const CUtensorMap* map_w, const Shared<whole>& shared, Place<CM, CN> place, int first,
                        int last) {
    using Tile = LinearTile<whole>;
    constexpr int kAChunks = kTileM / 64 / CN, kBChunks = Tile::kN / 64 / CM;  // this block's part of each operand
    Ring<Tile::kStages> ring;
    Ring<Tile::kWeights ? Tile::kWeights : 1> buffer;
    const uint16_t same_m = place.same_m(), same_n = place.same_n();
    for (int tile = first; tile < last; ++tile) {
        const int m = (tile / p.plan.n_tiles * CM + place.m) * kTileM;
        const int n = (tile % p.plan.n_tiles * CN + place.n) * Tile::kN;
        if constexpr (!whole) {
            barrier_wait(shared.weight_empty(buffer.slot), buffer.parity ^ 1);
            barrier_expect(shared.weight_full(buffer.slot), kWeightBytes);
            copy_weight<columns>(shared.weight(buffer.slot), map_w, m, n, shared.weight_full(buffer.slot));
            buffer.advance();
        }
        for (int s = 0; s < (whole ? 1 : p.samples); ++s) {
            int begin = 0, end = p.tokens;
            if constexpr (!whole) sample_range(p, s, begin, end);
            for (int token = begin; token < end; token += kStepK) {
                barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
                const uint32_t full = shared.full(ring.slot);
                barrier_expect(full, Tile::kStageBytes);
                for (int i = 0; i < kAChunks; ++i) {
                    const int chunk = CN == 1 ? i : place.n * kAChunks + i;
                    const uint32_t to = shared.a(ring.slot) + chunk * kChunkBytes;
                    if constexpr (CN == 1)
                        copy_box(to, map_a, m + chunk * 64, token, full, kEvictLast);
                    else
                        copy_box_multicast(to, map_a, m + chunk * 64, token, full, same_m, kEvictLast);
                }
                for (int i = 0; i < kBChunks; ++i) {
                    const int chunk = CM == 1 ? i : place.m * kBChunks + i;
                    const uint32_t to = shared.b(ring.slot) + chunk * kChunkBytes;
                    if constexpr (CM == 1)
                        copy_box(to, map_b, n + chunk * 64, token, full, kEvictLast);
                    else
                        copy_box_multicast(to, map_b, n + chunk * 64, token, full, same_n, kEvictLast);
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

// Address, for load_matrices, of this lane's row of four 8x8 matrices of a weight tile: the accumulator registers
// 8·j .. 8·j+7, that is 16 rows (of the warp's 16) and columns 16·j .. 16·j+15.
template <bool columns>
__device__ __forceinline__ uint32_t weight_address(uint32_t tile, int group, int warp, int lane, int j) {
    const int matrix = lane / 8, inner = lane % 8;
    if constexpr (columns) {  // memory rows are n, 128 bytes of m each; box `group` holds this warpgroup's 64 m
        const int n = j * 16 + (matrix >> 1) * 8 + inner, chunk = warp * 2 + (matrix & 1);
        return tile + group * kWeightBoxBytes + n * 128 + ((chunk ^ inner) << 4);
    } else {
        const int m = group * 64 + warp * 16 + (matrix & 1) * 8 + inner, chunk = j * 2 + (matrix >> 1);
        return tile + (chunk / 8) * kWeightBoxBytes + m * 128 + (((chunk % 8) ^ inner) << 4);
    }
}

__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// One warpgroup. `Ring`s run exactly as the producer's.
template <typename T, bool whole, bool squares, bool columns, int CM, int CN>
struct Consumer {
    using Tile = LinearTile<whole>;
    const LinearKernelArgs& p;
    const Shared<whole>& shared;
    Place<CM, CN> place;
    int group, warp, lane;
    Ring<Tile::kStages> ring;
    Ring<Tile::kWeights ? Tile::kWeights : 1> buffer;

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

    // The product over tokens [begin, end) into `d`, which it overwrites.
    __device__ __forceinline__ void multiply(float (&d)[Tile::kAccumulators], int begin, int end) {
        int previous = -1;
        for (int token = begin; token < end; token += kStepK) {
            barrier_wait(shared.full(ring.slot), ring.parity);
            if constexpr (!whole)
                if (end - token < kStepK) mask(ring.slot, end - token);
            product_begin();
            const uint64_t a = outer_major_descriptor(shared.a(ring.slot) + group * kChunkBytes, kChunkBytes);
            const uint64_t b = outer_major_descriptor(shared.b(ring.slot), kChunkBytes);
#pragma unroll
            for (int k = 0; k < kStepK / 16; ++k)
                Product<T>::add(d, a + k * kDescriptorStep, b + k * kDescriptorStep, token > begin || k > 0);
            product_commit();
            if (previous >= 0) {
                product_wait<1>();
                release(previous);
            }
            previous = ring.slot;
            ring.advance();
        }
        product_wait<0>();
        if (previous >= 0) release(previous);
    }

    __device__ void run(int first, int last) {
        if constexpr (whole)
            run_whole(first, last);
        else
            run_samples(first, last);
    }

    // Where this lane adds a quantity's sum over one of the warp's rows: of a quad, lane 0 serves row lane/4, lane 1
    // row lane/4 + 8, the others none.
    __device__ __forceinline__ float* slot_of(int tile, int first) const {
        const int m_tile = tile / p.plan.n_tiles;
        const int owner = m_tile * p.plan.n_tiles / p.plan.run;  // the first cluster with a tile of this m
        const int segment = (first / p.plan.run - owner) * CN + place.n;
        const int row = (m_tile * CM + place.m) * kTileM + group * 64 + warp * 16 + lane / 4 + (lane & 1) * 8;
        return p.partial + segment * p.plan.rows * p.plan.row_stride + row;
    }
    __device__ __forceinline__ bool writes() const { return (lane & 2) == 0; }
    __device__ __forceinline__ float pick(float upper, float lower) const {  // both quad sums; this lane's row
        upper = quad_sum(upper), lower = quad_sum(lower);
        return lane & 1 ? lower : upper;
    }

    __device__ __forceinline__ void run_whole(int first, int last) {
        float fine[2] = {}, signed_sum[2] = {};
        for (int tile = first; tile < last; ++tile) {
            float d[Tile::kAccumulators];
            multiply(d, 0, p.tokens);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                barrier_wait(shared.full(ring.slot), ring.parity);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    uint32_t w[4];
                    load_matrices<columns>(w, weight_address<columns>(shared.a(ring.slot), group, warp, lane, j));
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
            if (tile + 1 == last || (tile + 1) % p.plan.n_tiles == 0) {
                const float f = pick(fine[0], fine[1]), s = pick(signed_sum[0], signed_sum[1]);
                float* const slot = slot_of(tile, first);
                if (writes()) slot[0] = f * p.mean_scale, slot[p.plan.row_stride] = s * p.mean_scale;
                fine[0] = fine[1] = signed_sum[0] = signed_sum[1] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void run_samples(int first, int last) {
        constexpr int kFirstSigned = squares ? kLinearFineRows : 1;
        for (int tile = first; tile < last; ++tile) {
            const bool fresh = tile == first || tile % p.plan.n_tiles == 0;
            float* const slot = slot_of(tile, first);
            float sum[64], square[squares ? 64 : 1];
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                sum[i] = 0.0f;
                if constexpr (squares) square[i] = 0.0f;
            }
            const uint32_t weight = shared.weight(buffer.slot);
            barrier_wait(shared.weight_full(buffer.slot), buffer.parity);
            for (int s = 0; s < p.samples; ++s) {
                int begin, end;
                sample_range(p, s, begin, end);
                float* const at = slot + (kFirstSigned + s) * p.plan.row_stride;
                const float before = fresh || !writes() ? 0.0f : *at;  // on its way while the product runs
                float d[64];
                multiply(d, begin, end);
                float h[2] = {};
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    uint32_t w[4];
                    load_matrices<columns>(w, weight_address<columns>(weight, group, warp, lane, j));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 pair = unpack<T>(w[i]);
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
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                uint32_t w[4];
                load_matrices<columns>(w, weight_address<columns>(weight, group, warp, lane, j));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 pair = unpack<T>(w[i]);
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        const float value = k ? pair.y : pair.x;
                        const float t = sum[j * 8 + i * 2 + k] * p.mean_scale * value;
                        fine[0][i & 1] += fabsf(t);
                        if constexpr (squares) {
                            const float u = 0.5f * (square[j * 8 + i * 2 + k] * p.square_scale) * value * value;
                            fine[1][i & 1] += fabsf(u);
                            fine[2][i & 1] += fabsf(t - u);
                        }
                    }
                }
            }
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
    }
};

}  // namespace linear

#endif

template <typename T, bool whole, bool squares, bool columns, int CM, int CN>
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
    const int cluster = blockIdx.x / (CM * CN);
    const int first = cluster * p.plan.run, last = min(first + p.plan.run, p.plan.m_tiles * p.plan.n_tiles);
    if (threadIdx.x < 128) {
        give_registers_up<40>();
        if (threadIdx.x == 0) produce<whole, columns, CM, CN>(p, &map_a, &map_b, &map_w, shared, place, first, last);
    } else {
        take_registers<232>();
        const int group = int(threadIdx.x) / 128 - 1;
        Consumer<T, whole, squares, columns, CM, CN> consumer{
            p, shared, place, group, int(threadIdx.x) / 32 % 4, int(threadIdx.x) % 32, {}, {}};
        consumer.run(first, last);
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

template <typename T, bool whole, bool squares, bool columns, int CM, int CN>
LinearKernel describe_kernel(int dtype_index, LinearVariant variant) {
    using Tile = LinearTile<whole>;
    return {reinterpret_cast<const void*>(linear_kernel<T, whole, squares, columns, CM, CN>),
            kTileM,
            Tile::kN,
            CM,
            CN,
            kLinearThreads,
            Tile::kSharedBytes,
            {dtype_index, int(variant), columns}};
}

template <typename T, bool columns>
const LinearKernel& kernel_for(LinearVariant variant, int dtype_index) {
    static const LinearKernel kernels[] = {
        describe_kernel<T, true, false, columns, 2, 1>(dtype_index, LinearVariant::Whole),
        describe_kernel<T, false, false, columns, HYWIA_CM, HYWIA_CN>(dtype_index, LinearVariant::Samples),
        describe_kernel<T, false, true, columns, HYWIA_CM, HYWIA_CN>(dtype_index, LinearVariant::Squares),
    };
    return kernels[int(variant)];
}

}  // namespace hywia
