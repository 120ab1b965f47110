// Taylor importance on the GPU: the plan, the general-stride kernels, and the second pass that adds the pieces.
// The kernels themselves are in taylor_importance.cuh.
#include <algorithm>

#include "taylor_launch.cuh"

namespace hywia {
namespace {

int64_t power_of_two_up_to(int64_t n, int64_t most) {
    int64_t p = 1;
    while (p * 2 <= n && p * 2 <= most) p *= 2;
    return p;
}

// Pieces of a strip's reduction. One wave of equal blocks, as many as the GPU holds, ends at once. Where a float32 sum
// would run too long in it: some waves of shorter blocks, of which the last one is nearly full.
int64_t strip_pieces(int64_t reduce, int64_t strips, int64_t resident) {
    const int64_t longest = kStripRows * kLongestChain, one_wave = std::max<int64_t>(1, resident / strips);
    if (divide_up(reduce, one_wave) <= longest) return one_wave;
    int64_t best = divide_up(reduce, longest);
    double fullest = 0.0;
    for (int64_t waves = 4; waves <= 8; ++waves) {
        const int64_t pieces = resident * waves / strips;
        const double full = double(strips * pieces) / double(resident * waves);
        if (divide_up(reduce, std::max<int64_t>(pieces, 1)) <= longest && full > fullest + 0.02)
            best = pieces, fullest = full;
    }
    return best;
}

TaylorPlan make_plan(const TaylorImportanceArgs& a) {
    TaylorPlan plan;
    const int64_t width = a.weight.dtype == DType::Float32 ? 4 : 8;  // elements per 16-byte word of the weight
    const bool rows = a.reduce % width == 0 && all_operands(a, [](const Operand& x) {
                          return x.reduce_stride == 1 && aligned(x, x.unit_stride);
                      });
    const bool columns = a.units % width == 0 && all_operands(a, [](const Operand& x) {
                             return x.unit_stride == 1 && aligned(x, x.reduce_stride);
                         });
    plan.vectors = rows || columns;
    plan.rows = rows || (!columns && a.weight.reduce_stride <= a.weight.unit_stride);
    const int64_t count = plan.vectors ? width : 1, sms = multiprocessors();
    const int64_t row_words = a.reduce / count;
    plan.whole_rows = plan.rows && plan.vectors && a.units >= 4 * sms && row_words >= kRowThreads * 3 / 4 &&
                      row_words <= kRowThreads * kLongestChain;
    const int64_t strips = divide_up(a.units, kStripLanes * count);
    plan.strips = !plan.rows && plan.vectors && strips <= kTaylorCounters;
    if (plan.whole_rows) {
        plan.blocks = a.units;
    } else if (plan.strips) {
        plan.strip_count = strips, plan.pieces = strip_pieces(a.reduce, strips, sms * kStripBlocksPerSM);
        plan.length = a.reduce / plan.pieces, plan.longer = a.reduce % plan.pieces;
        plan.blocks = strips * plan.pieces;
        plan.fold = kStripLanes * count % a.group_size == 0 ? int(a.group_size) : 1;
    } else if (plan.rows) {
        // A warp per row; a short row takes a smaller team. Rows are cut when there are too few of them to fill the
        // GPU (16 warps per SM keep 65 KB in flight), or when a float32 sum would run too long.
        plan.lanes = int(power_of_two_up_to(std::max<int64_t>(1, a.reduce / count), 32));
        const int64_t stride = plan.lanes * count, teams = sms * 16 * 32 / plan.lanes;
        const int64_t shortest = stride * 4, longest = stride * kLongestChain;
        const int64_t wanted = divide_up(a.reduce, std::max<int64_t>(1, divide_up(teams, a.units)));
        plan.length = std::clamp(divide_up(wanted, stride) * stride, shortest, longest);
        plan.pieces = divide_up(a.reduce, plan.length);
        plan.blocks = divide_up(a.units * plan.pieces, kThreads / plan.lanes);
    } else {
        // A strip of 32 words; fewer when there are fewer units, and then the block's other lanes take more rows.
        plan.lanes = int(power_of_two_up_to(std::max<int64_t>(1, a.units / count), 32));
        const int64_t strips = divide_up(a.units, plan.lanes * count), stride = kThreads / plan.lanes;
        const int64_t shortest = stride * 4, longest = stride * kLongestChain;
        const int64_t waves = 2;  // of blocks over the GPU: one alone would end with its slowest SM
        const int64_t wanted = divide_up(a.reduce, divide_up(sms * kBlocksPerSM * waves, strips));
        plan.length = std::clamp(divide_up(wanted, stride) * stride, shortest, longest);
        plan.pieces = divide_up(a.reduce, plan.length);
        plan.blocks = strips * plan.pieces;
    }
    if (plan.blocks > 0x7fffffff) throw std::runtime_error("weight: too many units for one launch of the cuda backend");
    return plan;
}

bool needs_finish(const TaylorImportanceArgs& a, const TaylorPlan& plan) {
    return plan.strips ? plan.fold != a.group_size : plan.pieces > 1 || a.group_size > 1;
}

// Sums that the first kernel leaves for `finish`, of each kind.
int64_t partial_sums(const TaylorImportanceArgs& a, const TaylorPlan& plan) {
    if (!needs_finish(a, plan)) return 0;
    return plan.strips ? a.units : a.units * plan.pieces;
}

struct FinishArgs {
    const float* partial;         // fine, then signed at `+ units * pieces`
    int64_t outer, outer_stride;  // unit k owns partial[o * outer_stride + k * inner + i], o < outer, i < inner
    int64_t inner;
    int64_t total;       // partial sums per quantity
    int64_t units;       // outputs
    int lanes;           // threads per output
    bool units_fastest;  // neighbouring threads take neighbouring units, else neighbouring partial sums
    float *fine, *signed_sum;
    bool accumulate;
};

__global__ void __launch_bounds__(kThreads) finish(const FinishArgs a) {
    __shared__ double shared[2][kThreads];
    const int units_here = kThreads / a.lanes;
    const int lane = a.units_fastest ? threadIdx.x / units_here : threadIdx.x % a.lanes;
    const int local = a.units_fastest ? threadIdx.x % units_here : threadIdx.x / a.lanes;
    const int64_t unit = int64_t(blockIdx.x) * units_here + local;
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();  // the kernel before may still run: its partial sums are complete from here on
#endif
    double fine = 0.0, signed_sum = 0.0;
    if (unit < a.units) {
        for (int64_t e = lane; e < a.outer * a.inner; e += a.lanes) {
            const int64_t o = a.outer == 1 ? 0 : e / a.inner, i = e - o * a.inner;
            const int64_t at = o * a.outer_stride + unit * a.inner + i;
            fine += a.partial[at];
            signed_sum += a.partial[a.total + at];
        }
    }
    shared[0][local * a.lanes + lane] = fine;
    shared[1][local * a.lanes + lane] = signed_sum;
    for (int half = a.lanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) {
            shared[0][local * a.lanes + lane] += shared[0][local * a.lanes + lane + half];
            shared[1][local * a.lanes + lane] += shared[1][local * a.lanes + lane + half];
        }
    }
    if (unit < a.units && lane == 0) {  // this thread wrote the two sums it reads here
        const double f = shared[0][local * a.lanes], s = shared[1][local * a.lanes];
        a.fine[unit] = float(a.accumulate ? a.fine[unit] + f : f);
        a.signed_sum[unit] = float(a.accumulate ? a.signed_sum[unit] + s : s);
    }
}

void launch_finish(const TaylorImportanceArgs& a, const TaylorPlan& plan) {
    FinishArgs f;
    f.partial = a.workspace;
    f.outer = plan.rows || plan.strips ? 1 : plan.pieces;
    f.outer_stride = a.units;
    f.inner = plan.rows ? a.group_size * plan.pieces : a.group_size;
    f.total = partial_sums(a, plan);
    f.units = a.units / a.group_size;
    f.lanes = int(power_of_two_up_to(divide_up(f.outer * f.inner, 4), kThreads));
    f.units_fastest = f.inner < 8;
    f.fine = a.fine, f.signed_sum = a.signed_sum, f.accumulate = a.accumulate;

    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(divide_up(f.units, kThreads / f.lanes)));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(a.stream);
    // Overlap this launch with the end of the first kernel. Only code compiled for sm_90 or later waits for it, so ask
    // the loaded code, not the device: an older PTX may be what runs on a newer GPU.
    cudaFuncAttributes attributes;
    HYWIA_CHECK_CUDA(cudaFuncGetAttributes(&attributes, finish));
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
    HYWIA_CHECK_CUDA(cudaLaunchKernelEx(&config, finish, f));
}

TaylorImportanceArgs normalised(TaylorImportanceArgs a) {
    for (Operand* x : {&a.weight, &a.grad, &a.fisher}) {  // the stride of a dimension of size one means nothing
        if (a.reduce == 1) x->reduce_stride = a.units == 1 ? 1 : 0;
        if (a.units == 1) x->unit_stride = 0;
    }
    return a;
}

}  // namespace

int64_t taylor_importance_workspace(const TaylorImportanceArgs& args) {
    const TaylorImportanceArgs a = normalised(args);
    if (a.units == 0 || a.reduce == 0) return 0;
    const TaylorPlan plan = make_plan(a);
    const int64_t columns = kStripLanes * (a.weight.dtype == DType::Float32 ? 4 : 8);
    return 2 * partial_sums(a, plan) + (plan.strips && plan.pieces > 1 ? plan.blocks * 2 * columns : 0);
}

void taylor_importance_cuda(const TaylorImportanceArgs& args) {
    const TaylorImportanceArgs a = normalised(args);
    const cudaStream_t stream = static_cast<cudaStream_t>(a.stream);
    if (a.units == 0) return;
    if (a.reduce == 0) {  // nothing to add
        if (a.accumulate) return;
        HYWIA_CHECK_CUDA(cudaMemsetAsync(a.fine, 0, a.units / a.group_size * sizeof(float), stream));
        HYWIA_CHECK_CUDA(cudaMemsetAsync(a.signed_sum, 0, a.units / a.group_size * sizeof(float), stream));
        return;
    }
    const TaylorPlan plan = make_plan(a);
    const int64_t sums = partial_sums(a, plan);
    TaylorKernelArgs kernel = {a, plan, a.fine, a.signed_sum, a.workspace + 2 * sums, a.accumulate};
    if (needs_finish(a, plan)) {
        kernel.fine = a.workspace, kernel.signed_sum = a.workspace + sums;
        kernel.accumulate = false;
    }
    if (!plan.vectors)
        launch_taylor_alike<AnyType, 1>(kernel);
    else if (a.weight.dtype == DType::Float32)
        launch_taylor_float32(kernel);
    else if (a.weight.dtype == DType::BFloat16)
        launch_taylor_bfloat16(kernel);
    else
        launch_taylor_float16(kernel);
    if (needs_finish(a, plan)) launch_finish(a, plan);
}

}  // namespace hywia
