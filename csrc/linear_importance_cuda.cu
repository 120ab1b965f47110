// linear_importance on Hopper: the plan, the tensor maps, the launch, and the pass that adds the clusters' sums.
#include "linear_importance_cuda.h"

#include <map>
#include <mutex>
#include <utility>

namespace hywia {
namespace {

const LinearKernel& kernel_of(const LinearImportanceArgs& a) {
    const LinearMode mode = mode_of(a);
    const bool ragged = a.ragged, columns = a.axis == 1;
    return a.dtype == DType::BFloat16 ? linear_kernel_bfloat16(mode, ragged, columns)
                                      : linear_kernel_float16(mode, ragged, columns);
}

// The launch of so many clusters; `config` points into it.
struct ClusterLaunch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};

    ClusterLaunch(const LinearKernel& kernel, int clusters, cudaStream_t stream) {
        config.gridDim = dim3(unsigned(clusters * kLinearCluster)), config.blockDim = dim3(kernel.threads);
        config.dynamicSmemBytes = kernel.shared_bytes, config.stream = stream;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = kLinearCluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
        config.attrs = &cluster, config.numAttrs = 1;
    }
    ClusterLaunch(const ClusterLaunch&) = delete;
};

// Clusters of this kernel that the current device holds at once.
int resident_clusters(const LinearKernel& kernel) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, int> known;  // by device and kernel
    int device = 0;
    HYWIA_CHECK_CUDA(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> guard(mutex);
    int& count = known[{device, kernel.index}];
    if (count == 0) {
        HYWIA_CHECK_CUDA(
            cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
        ClusterLaunch launch(kernel, 1, nullptr);
        HYWIA_CHECK_CUDA(cudaOccupancyMaxActiveClusters(&count, kernel.function, &launch.config));
        if (count < 1) throw std::runtime_error("linear_importance: this GPU holds no cluster of the kernel's size");
    }
    return count;
}

LinearPlan plan_here(const LinearImportanceArgs& a) { return make_plan(a, resident_clusters(kernel_of(a))); }

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, looked up at run time: the extension links no libcuda.
EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult status;
        HYWIA_CHECK_CUDA(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
        if (status != cudaDriverEntryPointSuccess)
            throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; update it");
        return reinterpret_cast<EncodeTiled>(found);
    }();
    return function;
}

// Boxes of 64 columns (128 bytes) by `box_rows` rows of a matrix; what lies outside the matrix reads as zero.
CUtensorMap tensor_map(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
    CUtensorMap map;
    const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, stride[1] = {cuuint64_t(row_stride) * 2};
    const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, step[2] = {1, 1};
    const CUtensorMapDataType type =
        dtype == DType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult status = encode_tiled()(&map, type, 2, const_cast<void*>(data), size, stride, box, step,
                                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled failed with code " + std::to_string(int(status)));
    return map;
}

// Sums over tables: `rows` of each, `slots` tables `table` floats apart, from `first` on.
struct FinishPart {
    const float* first;
    int rows, slots;
    int64_t table;
    float* out;
};

struct FinishArgs {
    FinishPart fine, coarse;
    int64_t row_stride, group_size, units;
    bool accumulate;
};

// One thread, or one warp where many rows fold into a unit, per output.
template <int lanes>
__global__ void __launch_bounds__(256) linear_finish(const FinishArgs a) {
    const int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) / lanes;
    const int lane = threadIdx.x % lanes;
    if (at >= (a.fine.rows + a.coarse.rows) * a.units) return;  // whole warps: 256 is a multiple of `lanes`
    int64_t row = at / a.units;
    const int64_t unit = at - row * a.units;
    const FinishPart& part = row < a.fine.rows ? a.fine : a.coarse;
    if (row >= a.fine.rows) row -= a.fine.rows;
    double sum = 0.0;
    for (int64_t i = lane; i < a.group_size; i += lanes) {
        const float* from = part.first + row * a.row_stride + unit * a.group_size + i;
        for (int s = 0; s < part.slots; ++s) sum += from[s * part.table];
    }
    for (int mask = 1; mask < lanes; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane) return;
    float* to = part.out + row * a.units + unit;
    *to = float(a.accumulate ? *to + sum : sum);
}

void launch_finish(const LinearImportanceArgs& a, const LinearPlan& plan) {
    FinishArgs f;
    // Rows of the forms that make all three orders are theirs; the others make the one that is asked for.
    const int wanted = a.order == LinearOrder::Second ? 1 : a.order == LinearOrder::Mixed ? 2 : 0;
    const int first = plan.fine_rows == kLinearFineRows ? wanted : 0;
    f.fine = {a.workspace + first * plan.row_stride, a.order == LinearOrder::All ? kLinearFineRows : 1, plan.share,
              plan.fine_table, a.fine};
    f.coarse = {a.workspace + plan.signed_at, plan.signed_rows, plan.signed_slots, plan.signed_table, a.coarse};
    f.row_stride = plan.row_stride, f.group_size = a.group_size, f.units = outer_size(a) / a.group_size;
    f.accumulate = a.accumulate;
    const bool warps = a.group_size >= 8;
    const int64_t threads = (f.fine.rows + f.coarse.rows) * f.units * (warps ? 32 : 1);
    const auto kernel = warps ? linear_finish<32> : linear_finish<1>;
    kernel<<<unsigned(divide_up(threads, 256)), 256, 0, static_cast<cudaStream_t>(a.stream)>>>(f);
    HYWIA_CHECK_CUDA(cudaGetLastError());
}

struct ProductArgs {
    const void *a, *b;  // [tokens, columns]
    int64_t a_stride, b_stride;
    int columns, length, parts;
    const int32_t* offsets;  // as in LinearKernelArgs
    float scale;
    float* out;  // [parts, samples, columns], with these strides
    int64_t part_stride, sample_stride;
};

// out[part, s, c] = scale · sum of a[t, c]·b[t, c] over a part of sample s: the derivative of its loss with respect to
// a mask on what column c carries. 16 lanes of 8 columns by 16 tokens at a time.
template <typename T>
__global__ void __launch_bounds__(256) linear_products(const ProductArgs p) {
    __shared__ float shared[16][kProductColumns];
    const int lane = threadIdx.x % 16, row = threadIdx.x / 16;
    const int first = blockIdx.x * kProductColumns, column = first + lane * 8;
    const int s = blockIdx.y, part = blockIdx.z;
    const int begin = p.offsets ? p.offsets[s] : s * p.length, end = p.offsets ? p.offsets[s + 1] : begin + p.length;
    const int size = (end - begin + p.parts - 1) / p.parts;
    const int from = begin + part * size, to = min(end, from + size);
    float sum[8] = {};
    if (column + 8 <= p.columns) {
#pragma unroll 4
        for (int t = from + row; t < to; t += 16) {
            Vector<T, 8> a, b;
            a.load(p.a, t * p.a_stride + column, DType{}), b.load(p.b, t * p.b_stride + column, DType{});
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] += a.get(i, DType{}) * b.get(i, DType{});
        }
    } else {
        for (int t = from + row; t < to; t += 16)
            for (int i = 0; i < 8; ++i)
                if (column + i < p.columns)
                    sum[i] += to_float(static_cast<const T*>(p.a)[t * p.a_stride + column + i]) *
                              to_float(static_cast<const T*>(p.b)[t * p.b_stride + column + i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) shared[row][lane * 8 + i] = sum[i];
    __syncthreads();
    if (threadIdx.x >= kProductColumns || first + int(threadIdx.x) >= p.columns) return;
    float total = 0.0f;
    for (int i = 0; i < 16; ++i) total += shared[i][threadIdx.x];
    p.out[part * p.part_stride + s * p.sample_stride + first + threadIdx.x] = total * p.scale;
}

void launch_products(const LinearImportanceArgs& a, const LinearPlan& plan) {
    ProductArgs p;
    p.a = a.axis == 0 ? a.grad_output : a.input, p.a_stride = a.axis == 0 ? a.grad_output_stride : a.input_stride;
    p.b = a.mapped, p.b_stride = a.mapped_stride;
    p.columns = int(outer_size(a)), p.length = int(a.tokens / a.samples), p.parts = plan.signed_slots;
    p.offsets = a.offsets, p.scale = a.scale;
    p.out = a.workspace + plan.signed_at;
    p.part_stride = plan.signed_table, p.sample_stride = plan.row_stride;
    const dim3 grid(unsigned(divide_up(p.columns, kProductColumns)), unsigned(a.samples), unsigned(p.parts));
    const auto kernel = a.dtype == DType::BFloat16 ? linear_products<__nv_bfloat16> : linear_products<__half>;
    kernel<<<grid, 256, 0, static_cast<cudaStream_t>(a.stream)>>>(p);
    HYWIA_CHECK_CUDA(cudaGetLastError());
}

}  // namespace

int64_t linear_importance_workspace(const LinearImportanceArgs& a) {
    return a.rows == 0 || a.columns == 0 ? 0 : plan_here(a).floats;
}

LinearCut linear_importance_cut(const LinearImportanceArgs& a, int resident) {
    const LinearPlan plan = make_plan(a, resident);
    return {plan.m_tiles, plan.n_tiles, plan.across,       plan.share,
            plan.steps(), plan.floats,  plan.signed_slots, plan.fine_rows};
}

void linear_importance_cuda(const LinearImportanceArgs& a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(a.stream);
    if (a.rows == 0 || a.columns == 0) {
        if (outer_size(a) == 0 || a.accumulate) return;
        const int64_t units = outer_size(a) / a.group_size;
        const int64_t fine_rows = a.order == LinearOrder::All ? kLinearFineRows : 1;
        HYWIA_CHECK_CUDA(cudaMemsetAsync(a.fine, 0, fine_rows * units * sizeof(float), stream));
        HYWIA_CHECK_CUDA(cudaMemsetAsync(a.coarse, 0, (a.per_sample ? a.samples : 1) * units * sizeof(float), stream));
        return;
    }
    if (signed_from_mapped(a) && a.samples > 65535)
        throw std::runtime_error("samples: at most 65535 for one call of the cuda backend with `mapped`");
    const LinearKernel& kernel = kernel_of(a);
    const LinearPlan plan = plan_here(a);
    const CUtensorMap map_dy =
        tensor_map(a.dtype, a.grad_output, a.tokens, a.rows, a.grad_output_stride, kLinearStepTokens);
    const CUtensorMap map_x = tensor_map(a.dtype, a.input, a.tokens, a.columns, a.input_stride, kLinearStepTokens);
    const CUtensorMap map_w = tensor_map(a.dtype, a.weight, a.rows, a.columns, a.weight_stride, 128);

    LinearKernelArgs p;
    p.offsets = a.offsets;
    p.samples = int(a.samples), p.tokens = int(a.tokens), p.length = int(a.tokens / a.samples);
    p.plan = plan;
    p.scale = a.scale;
    p.mean_scale = float(double(a.scale) / double(a.samples));
    p.square_scale = float(double(a.scale) * double(a.scale) / double(a.samples));
    p.partial = a.workspace;

    const ClusterLaunch launch(kernel, plan.across * plan.share, stream);
    void* arguments[] = {const_cast<CUtensorMap*>(a.axis == 0 ? &map_dy : &map_x),
                         const_cast<CUtensorMap*>(a.axis == 0 ? &map_x : &map_dy), const_cast<CUtensorMap*>(&map_w),
                         &p};
    HYWIA_CHECK_CUDA(cudaLaunchKernelExC(&launch.config, kernel.function, arguments));
    if (signed_from_mapped(a)) launch_products(a, plan);
    launch_finish(a, plan);
}

}  // namespace hywia
