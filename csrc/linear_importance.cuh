// Scores straight from a linear layer's backward on Hopper: the weight-gradient product with scoring in its epilogue.
//
//   G_s = grad_outputᵀ·input over the tokens of sample s; nothing of it reaches memory.
//
// A block owns tiles of the weight, `m` along the units and `n` along the other dimension. One warp keeps a ring of
// shared-memory stages full by bulk tensor copies; two warpgroups multiply, 64 rows of the tile each. Both operands
// have their tokens in rows, so the tensor cores read them "outer-major" and nothing is transposed.
//
// A cluster walks its tiles (LinearPlan says which) and adds its sums to its own rows of `partial`: the order of
// additions is fixed, no two blocks touch one address, and the tables stay small however many samples there are.
// The forms are in files of their own: linear_merged, linear_samples, linear_second.
#pragma once

#include <type_traits>

#include "linear_merged.cuh"
#include "linear_samples.cuh"
#include "linear_second.cuh"

namespace hywia {

template <typename T, LinearMode mode, bool ragged, bool columns>
__global__ void __launch_bounds__(kLinearThreads, 1)
    linear_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                  const __grid_constant__ CUtensorMap map_w, const __grid_constant__ LinearKernelArgs p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace linear;
    using Tile = LinearTile<mode>;
    extern __shared__ uint8_t dynamic[];
    const Shared<Tile> shared(shared_address(dynamic));
    const int rank = int(cluster_rank());
    if (threadIdx.x == 0) {
        prefetch_map(&map_a), prefetch_map(&map_b), prefetch_map(&map_w);
        for (int i = 0; i < Tile::kStages; ++i) {
            barrier_init(shared.full(i), 1);
            barrier_init(shared.empty(i), kConsumers * 4 * kLinearCluster);
        }
        for (int i = 0; i < Tile::kWeights; ++i) {
            barrier_init(shared.weight_full(i), 1);
            barrier_init(shared.weight_empty(i), kConsumers * 4);
        }
        fence_barrier_init();
    }
    cluster_sync();
    const Walk walk(p.plan, blockIdx.x / kLinearCluster);
    if (threadIdx.x < 128) {
        give_registers_up<40>();
        if (threadIdx.x == 0) {
            Producer<mode, ragged, columns> producer{p, &map_a, &map_b, &map_w, shared, rank, {}, {}};
            producer.run(walk);
        }
    } else {
        take_registers<232>();
        using Form =
            std::conditional_t<mode == LinearMode::Merged, MergedConsumer<T, columns>,
                               std::conditional_t<mode == LinearMode::Second, SecondConsumer<T, ragged, columns>,
                                                  SampleConsumer<T, mode, ragged, columns>>>;
        const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128 - 1, 0);  // known to be one for the warp
        const int warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
        Form consumer{{p, shared, rank, group, warp, lane, {}, group == 0}};
        consumer.run(walk);
    }
    // A block must not leave while another may still copy into it or arrive at its barriers.
    cluster_sync();
#endif
}

template <typename T, LinearMode mode, bool columns>
const LinearKernel& kernel_of_mode(bool ragged, int index) {
    const auto describe = [&](const void* function, int at) {
        return LinearKernel{function, kLinearThreads, LinearTile<mode>::kSharedBytes, at};
    };
    const int at = index + 2 * int(mode);
    static const LinearKernel equal =
        describe(reinterpret_cast<const void*>(linear_kernel<T, mode, false, columns>), at);
    if constexpr (mode == LinearMode::Merged) {  // reads no samples' limits
        return equal;
    } else {
        static const LinearKernel limits =
            describe(reinterpret_cast<const void*>(linear_kernel<T, mode, true, columns>), at + 1);
        return ragged ? limits : equal;
    }
}

// `index`: of the first of this type's kernels for these units.
template <typename T, bool columns>
const LinearKernel& kernel_for(LinearMode mode, bool ragged, int index) {
    switch (mode) {
        case LinearMode::Merged:
            return kernel_of_mode<T, LinearMode::Merged, columns>(ragged, index);
        case LinearMode::Samples:
            return kernel_of_mode<T, LinearMode::Samples, columns>(ragged, index);
        case LinearMode::Squares:
            return kernel_of_mode<T, LinearMode::Squares, columns>(ragged, index);
        case LinearMode::Sums:
            return kernel_of_mode<T, LinearMode::Sums, columns>(ragged, index);
        default:
            return kernel_of_mode<T, LinearMode::Second, columns>(ragged, index);
    }
}

}  // namespace hywia
