// linear_importance on Hopper: the plan, the tensor maps, the launch, and the pass that adds the clusters' sums.
#include "linear_importance_cuda.h"

#include <algorithm>
#include <mutex>

namespace hywia {
namespace {

constexpr int64_t kTableBytes = 64 << 20;
constexpr int kProductColumns = 128;      // of a block of linear_products: 16 lanes of 8
constexpr int64_t kProductBlocks = 1056;  // eight on each of 132 multiprocessors

int64_t outer_size(const LinearImportanceArgs& a) { return a.axis == 0 ? a.rows : a.columns; }
int64_t inner_size(const LinearImportanceArgs& a) { return a.axis == 0 ? a.columns : a.rows; }
bool squares(const LinearImportanceArgs& a) { return a.order != LinearOrder::First; }

LinearMode mode_of(const LinearImportanceArgs& a) {
    if (!a.per_sample || (a.mapped && !squares(a))) return LinearMode::Whole;
    return a.mapped ? LinearMode::Fine : squares(a) ? LinearMode::Squares : LinearMode::Samples;
}

const LinearKernel& kernel_of(const LinearImportanceArgs& a) {
    const LinearMode mode = mode_of(a);
    const bool ragged = a.offsets != nullptr, columns = a.axis == 1;
    return a.dtype == DType::BFloat16 ? linear_kernel_bfloat16(mode, ragged, columns)
                                      : linear_kernel_float16(mode, ragged, columns);
}

// Clusters of this kernel that the current device holds at once.
int resident_clusters(const LinearKernel& kernel) {
    constexpr int kDevices = 64;
    static std::mutex mutex;
    static int known[kDevices][kLinearKernels] = {};
    int device = 0;
    HYWIA_CHECK_CUDA(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> guard(mutex);
    int& count = known[device % kDevices][kernel.index];
    if (count == 0) {
        HYWIA_CHECK_CUDA(
            cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
        const int blocks = kernel.cluster_m * kernel.cluster_n;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(blocks), config.blockDim = dim3(kernel.threads);
        config.dynamicSmemBytes = kernel.shared_bytes;
        cudaLaunchAttribute cluster = {};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
        config.attrs = &cluster, config.numAttrs = 1;
        HYWIA_CHECK_CUDA(cudaOccupancyMaxActiveClusters(&count, kernel.function, &config));
        if (count < 1) throw std::runtime_error("linear_importance: this GPU holds no cluster of the kernel's size");
    }
    return count;
}

LinearPlan make_plan(const LinearImportanceArgs& a) {
    const LinearKernel& kernel = kernel_of(a);
    LinearPlan plan;
    plan.cluster_m = kernel.cluster_m, plan.cluster_n = kernel.cluster_n;
    const int64_t m = kernel.tile_m * kernel.cluster_m, n = kernel.tile_n * kernel.cluster_n;
    plan.m_tiles = int(divide_up(outer_size(a), m)), plan.n_tiles = int(divide_up(inner_size(a), n));
    // `whole` writes the mean's signed sums into the row after its fine sum, wanted or not.
    plan.first_signed = squares(a) ? kLinearFineRows : a.per_sample && a.mapped ? 2 : 1;
    plan.rows = plan.first_signed + (a.per_sample ? a.samples : 1);
    plan.row_stride = plan.m_tiles * m;
    // The table of partial sums grows with `share`. Among the cuts that finish in the fewest steps, take the one whose
    // operands of one step are the smallest.
    const int resident = resident_clusters(kernel);
    const int64_t row_bytes = plan.rows * plan.row_stride * plan.cluster_n * int64_t(sizeof(float));
    const int64_t most =
        std::min<int64_t>(std::min(plan.n_tiles, resident), std::max<int64_t>(1, kTableBytes / row_bytes));
    int64_t best_steps = 0, best_width = 0;
    for (int share = 1; share <= most; ++share) {
        const int across = std::min(resident / share, plan.m_tiles);
        const int groups = int(divide_up(plan.m_tiles, across));
        const int64_t steps = divide_up(int64_t(groups) * plan.n_tiles, share), width = across * m + share * n;
        if (share > 1 && (steps > best_steps || (steps == best_steps && width >= best_width))) continue;
        best_steps = steps, best_width = width;
        plan.share = share, plan.across = across, plan.groups = groups;
    }
    plan.signed_slots = plan.share * plan.cluster_n;
    if (a.per_sample && a.mapped) {  // enough blocks to fill the GPU, and no more parts than there are tables
        const int64_t blocks = divide_up(outer_size(a), kProductColumns) * a.samples;
        const int64_t wanted = std::min(divide_up(kProductBlocks, blocks), divide_up(a.tokens, a.samples * 128));
        plan.signed_slots = int(std::clamp<int64_t>(wanted, 1, plan.signed_slots));
    }
    return plan;
}

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

struct FinishArgs {
    const float* partial;
    LinearPlan plan;
    int64_t group_size, units;
    int first_fine, fine_rows, signed_rows;
    float *fine, *coarse;
    bool accumulate;
};

// One thread, or one warp where many rows fold into a unit, per output.
template <int lanes>
__global__ void __launch_bounds__(256) linear_finish(const FinishArgs a) {
    const int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) / lanes;
    const int lane = threadIdx.x % lanes;
    if (at >= (a.fine_rows + a.signed_rows) * a.units) return;  // whole warps: 256 is a multiple of `lanes`
    const int64_t row = at / a.units, unit = at - row * a.units;
    const bool fine = row < a.fine_rows;
    const int64_t quantity = fine ? a.first_fine + row : a.plan.first_signed + row - a.fine_rows;
    const int64_t table = a.plan.rows * a.plan.row_stride;
    double sum = 0.0;
    for (int64_t i = lane; i < a.group_size; i += lanes) {
        const float* from = a.partial + quantity * a.plan.row_stride + unit * a.group_size + i;
        const int slots = fine ? a.plan.share * a.plan.cluster_n : a.plan.signed_slots;
        for (int s = 0; s < slots; ++s) sum += from[s * table];
    }
    for (int mask = 1; mask < lanes; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane) return;
    float* to = fine ? a.fine + row * a.units + unit : a.coarse + (row - a.fine_rows) * a.units + unit;
    *to = float(a.accumulate ? *to + sum : sum);
}

void launch_finish(const LinearImportanceArgs& a, const LinearPlan& plan) {
    FinishArgs f;
    f.partial = a.workspace, f.plan = plan;
    f.group_size = a.group_size, f.units = outer_size(a) / a.group_size;
    f.first_fine = a.order == LinearOrder::Second ? 1 : a.order == LinearOrder::Mixed ? 2 : 0;
    f.fine_rows = a.order == LinearOrder::All ? kLinearFineRows : 1;
    f.signed_rows = int(plan.rows - plan.first_signed);
    f.fine = a.fine, f.coarse = a.coarse, f.accumulate = a.accumulate;
    const bool warps = a.group_size >= 8;
    const int64_t threads = (f.fine_rows + f.signed_rows) * f.units * (warps ? 32 : 1);
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
    p.out = a.workspace + plan.first_signed * plan.row_stride;
    p.part_stride = plan.rows * plan.row_stride, p.sample_stride = plan.row_stride;
    if (a.samples > 65535) throw std::runtime_error("samples: at most 65535 for one call of the cuda backend");
    const dim3 grid(unsigned(divide_up(p.columns, kProductColumns)), unsigned(a.samples), unsigned(p.parts));
    const auto kernel = a.dtype == DType::BFloat16 ? linear_products<__nv_bfloat16> : linear_products<__half>;
    kernel<<<grid, 256, 0, static_cast<cudaStream_t>(a.stream)>>>(p);
    HYWIA_CHECK_CUDA(cudaGetLastError());
}

}  // namespace

int64_t linear_importance_workspace(const LinearImportanceArgs& a) {
    if (a.rows == 0 || a.columns == 0) return 0;
    const LinearPlan plan = make_plan(a);
    return int64_t(plan.share) * plan.cluster_n * plan.rows * plan.row_stride;
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
    const LinearKernel& kernel = kernel_of(a);
    const LinearPlan plan = make_plan(a);
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

    const int blocks = kernel.cluster_m * kernel.cluster_n;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(plan.across * plan.share * blocks)), config.blockDim = dim3(kernel.threads);
    config.dynamicSmemBytes = kernel.shared_bytes, config.stream = stream;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    config.attrs = &cluster, config.numAttrs = 1;
    void* arguments[] = {const_cast<CUtensorMap*>(a.axis == 0 ? &map_dy : &map_x),
                         const_cast<CUtensorMap*>(a.axis == 0 ? &map_x : &map_dy), const_cast<CUtensorMap*>(&map_w),
                         &p};
    HYWIA_CHECK_CUDA(cudaLaunchKernelExC(&config, kernel.function, arguments));
    if (a.per_sample && a.mapped) launch_products(a, plan);  // after it: `whole` leaves its own signed sums in a row
    launch_finish(a, plan);
}

}  // namespace hywia
