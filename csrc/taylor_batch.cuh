// Taylor importance of many matrices in one launch. Instantiated once per order in taylor_batch_*.cu.
//
// The work is cut by result, not by matrix: a cluster of blocks owns a chunk of a result's units and reads all that
// counts towards them, the rows of one matrix and the columns of another. Nothing is left for a second kernel, and the
// bits of a result do not depend on what else is in the batch beyond the size of the cluster.
//
//   rows     warps of the cluster take the chunk's rows (or parts of them) in turn.
//   columns  `lanes` threads side by side cover the chunk's columns, and the threads of all blocks share the reduction.
//
// Each block ends with two sums per unit in shared memory; the first block of the cluster reads those of the others and
// writes the result. Every addition has its place, so the same input gives the same bits.
#pragma once

#include <cooperative_groups.h>

#include "taylor_importance.cuh"

namespace hywia {

constexpr int kBatchThreads = 512;
constexpr int kBatchWarps = kBatchThreads / 32;
constexpr int kBatchBlocksPerSM = 2;
constexpr int kBatchMembers = 24;  // matrices of a launch: the arguments of a kernel end at 4 KB
constexpr int kMaxCluster = 8;     // what every GPU with clusters grants
constexpr int kChunkUnits = 128;   // most units of a chunk
constexpr int kStripLines = 256;   // most columns that a block reads side by side: 32 lanes of 8

struct BatchMember {
    Operand weight, grad, fisher;
    int64_t reduce;
    int32_t group_size;
    int16_t parts;  // of a row, each for one warp
    bool rows;
};

struct BatchResult {
    float *fine, *signed_sum;
    int64_t units;
    int32_t first_member, members;
    int32_t first_chunk, chunk_units;
    bool accumulate;
};

struct BatchKernelArgs {
    BatchMember member[kBatchMembers];  // in the order of the results
    BatchResult result[kBatchMembers];
    int32_t results;
    int32_t cluster;  // blocks of a cluster
};
static_assert(sizeof(BatchKernelArgs) <= 4096, "the arguments of a kernel end at 4 KB");

struct BatchShared {
    float4 own[4][kBatchThreads];              // a thread's column sums: fine, then signed
    float warps[2][kBatchWarps][kChunkUnits];  // a warp's row sums
    float lines[2][kStripLines];               // a block's column sums, before folding
    float units[2][kChunkUnits];               // a block's result
};

struct Chunk {
    int64_t first_unit;
    int units, rank, cluster;
};

// Where a thread reads one operand, and how far on its next vector lies: two registers each instead of a
// multiplication.
template <typename T, int count>
struct Reader {
    const T* at;
    int64_t step;
    __device__ __forceinline__ Reader(const Operand& x, int64_t offset, int64_t stride)
        : at(static_cast<const T*>(x.data) + offset), step(stride) {}
    __device__ __forceinline__ void load(Vector<T, count>& v, int ahead) const { v.load(at, ahead * step, DType()); }
    __device__ __forceinline__ void advance(int steps) { at += steps * step; }
};
template <int count>
struct Reader<void, count> {
    __device__ __forceinline__ Reader(const Operand&, int64_t, int64_t) {}
    __device__ __forceinline__ void load(Vector<void, count>&, int) const {}
    __device__ __forceinline__ void advance(int) {}
};
template <Order order, Along along, typename W, typename G, typename F, int count>
struct Readers {
    Reader<W, count> w;
    Reader<G, count> g;
    Reader<F, count> f;
    // `stride`: of the reduction between two steps.
    __device__ __forceinline__ Readers(const BatchMember& m, int64_t unit, int64_t position, int stride)
        : w(m.weight, offset_of<along, count>(m.weight, unit, position), step_of(m.weight, stride)),
          g(m.grad, offset_of<along, count>(m.grad, unit, position), step_of(m.grad, stride)),
          f(m.fisher, offset_of<along, count>(m.fisher, unit, position), step_of(m.fisher, stride)) {}
    static __device__ __forceinline__ int64_t step_of(const Operand& x, int stride) {
        return along == Along::Reduce ? stride : stride * x.reduce_stride;
    }
    // Steps `at`, `at + 1`, ... of which the last before `stop` is real; those behind it are empty.
    template <int unroll>
    __device__ __forceinline__ void load(Step<order, along, W, G, F, count> (&step)[unroll], int at, int stop) const {
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            if (at + u < stop)
                w.load(step[u].w, u), g.load(step[u].g, u), f.load(step[u].f, u);
            else
                step[u].clear();
        }
    }
    __device__ __forceinline__ void advance(int steps) { w.advance(steps), g.advance(steps), f.advance(steps); }
};

// A call of its own per mix of dtypes (here and below): merged into one body, they would spill each other's registers.
template <Order order, typename W, typename G, typename F, int count>
__device__ __noinline__ void chunk_rows(const BatchMember& m, const Chunk& chunk, BatchShared& shared) {
    constexpr int kUnroll = Unroll<W, G, F, count>::kSteps, kStride = 32 * count;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t items = int64_t(chunk.units) * m.group_size * m.parts, words = m.reduce / count;
    for (int64_t item = chunk.rank * kBatchWarps + warp; item < items; item += chunk.cluster * kBatchWarps) {
        const int64_t line = item / m.parts, part = item - line * m.parts;
        const int64_t begin = words * part / m.parts * count, end = words * (part + 1) / m.parts * count;
        Readers<order, Along::Reduce, W, G, F, count> readers(m, chunk.first_unit * m.group_size + line,
                                                              begin + lane * count, kStride);
        // Steps of this lane; a 32-bit count, since a step is 128 elements of a row at least.
        const int steps = int((end - begin - lane * count + kStride - 1) / kStride);
        float fine_total = 0.0f, signed_total = 0.0f;
        for (int first = 0; first < steps; first += int(kLongestChain)) {
            const int stop = min(steps, first + int(kLongestChain));
            float fine = 0.0f, signed_sum = 0.0f;
            for (int at = first; at < stop; at += kUnroll, readers.advance(kUnroll)) {
                Step<order, Along::Reduce, W, G, F, count> step[kUnroll];
                readers.load(step, at, stop);
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) step[u].add_to(m, fine, signed_sum);
            }
            fine_total += fine, signed_total += signed_sum;
        }
        fine_total = warp_sum(fine_total, 1, 32), signed_total = warp_sum(signed_total, 1, 32);
        if (lane == 0) {
            const int unit = int(line / m.group_size);
            shared.warps[0][warp][unit] += fine_total;
            shared.warps[1][warp][unit] += signed_total;
        }
    }
}

template <Order order, typename W, typename G, typename F, int count>
__device__ __noinline__ void chunk_columns(const BatchMember& m, const Chunk& chunk, BatchShared& shared) {
    // Half as many loads ahead as elsewhere: the sums of `count` columns take their registers.
    constexpr int kUnroll = (Unroll<W, G, F, count>::kSteps + 1) / 2 + (Unroll<W, G, F, count>::kWords == 3),
                  kQuads = count / 4;
    const int lines = chunk.units * m.group_size;
    const int64_t begin = m.reduce * chunk.rank / chunk.cluster, end = m.reduce * (chunk.rank + 1) / chunk.cluster;
    for (int first = 0; first < lines; first += 32 * count) {
        const int here = min(32 * count, lines - first), lanes = here / count, stride = kBatchThreads / lanes;
        const int lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
        const int64_t line = chunk.first_unit * m.group_size + first + lane * count;
        // Steps of this thread; a 32-bit count, since 16 rows or more make a step.
        const int steps = row < stride ? int((end - begin - row + stride - 1) / stride) : 0;
#pragma unroll
        for (int q = 0; q < 2 * kQuads; ++q) shared.own[q][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        Readers<order, Along::Units, W, G, F, count> readers(m, line, begin + row, stride);
        for (int at = 0; at < steps;) {
            float sum[2][count] = {};
            const int stop = min(steps, at + int(kLongestChain));
            for (; at < stop; at += kUnroll) {
                Step<order, Along::Units, W, G, F, count> step[kUnroll];
                readers.load(step, at, stop);
                add_columns(step, m, sum[0], sum[1]);
                readers.advance(kUnroll);
            }
#pragma unroll
            for (int q = 0; q < 2 * kQuads; ++q) {
                float4 total = shared.own[q][threadIdx.x];
                const float* more = sum[q / kQuads] + q % kQuads * 4;
                total.x += more[0], total.y += more[1], total.z += more[2], total.w += more[3];
                shared.own[q][threadIdx.x] = total;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * here; i += kBatchThreads) {
            const int kind = i >= here, column = i - kind * here, element = column % count;
            const float4* own = shared.own[kind * kQuads + element / 4];
            float total = 0.0f;
#pragma unroll 8
            for (int r = 0; r < stride; ++r)
                total += reinterpret_cast<const float*>(own + r * lanes + column / count)[element % 4];
            shared.lines[kind][column] = total;
        }
        __syncthreads();
        if (m.group_size == 1) {
            for (int i = threadIdx.x; i < 2 * here; i += kBatchThreads) {
                const int kind = i >= here, column = i - kind * here;
                shared.units[kind][first + column] += shared.lines[kind][column];
            }
        } else {
            const int first_unit = first / m.group_size, last_unit = (first + here - 1) / m.group_size;
            for (int unit = first_unit + threadIdx.x / 32; unit <= last_unit; unit += kBatchWarps) {
                const int from = max(unit * m.group_size - first, 0), to = min((unit + 1) * m.group_size - first, here);
                float fine = 0.0f, signed_sum = 0.0f;
                for (int column = from + threadIdx.x % 32; column < to; column += 32)
                    fine += shared.lines[0][column], signed_sum += shared.lines[1][column];
                fine = warp_sum(fine, 1, 32), signed_sum = warp_sum(signed_sum, 1, 32);
                if (threadIdx.x % 32 == 0) shared.units[0][unit] += fine, shared.units[1][unit] += signed_sum;
            }
        }
    }
}

template <Order order, typename W, typename G, typename F, int count>
__device__ __forceinline__ void chunk_member(const BatchMember& m, const Chunk& chunk, BatchShared& shared) {
    if (m.rows)
        chunk_rows<order, W, G, F, count>(m, chunk, shared);
    else
        chunk_columns<order, W, G, F, count>(m, chunk, shared);
}

template <Order order, typename W>
__device__ __forceinline__ void chunk_half(const BatchMember& m, const Chunk& chunk, BatchShared& shared) {
    const bool g32 = m.grad.dtype == DType::Float32, f32 = m.fisher.dtype == DType::Float32;
    if constexpr (order == Order::First) {
        if (g32)
            chunk_member<order, W, float, void, 8>(m, chunk, shared);
        else
            chunk_member<order, W, W, void, 8>(m, chunk, shared);
    } else if constexpr (order == Order::Second) {
        if (f32)
            chunk_member<order, W, void, float, 8>(m, chunk, shared);
        else
            chunk_member<order, W, void, W, 8>(m, chunk, shared);
    } else {
        if (g32)
            chunk_member<order, W, float, float, 8>(m, chunk, shared);
        else if (f32)
            chunk_member<order, W, W, float, 8>(m, chunk, shared);
        else
            chunk_member<order, W, W, W, 8>(m, chunk, shared);
    }
}

template <Order order>
__global__ void __launch_bounds__(kBatchThreads, kBatchBlocksPerSM)
    taylor_batch(const __grid_constant__ BatchKernelArgs a) {
    extern __shared__ __align__(16) unsigned char memory[];
    BatchShared& shared = *reinterpret_cast<BatchShared*>(memory);
    const int id = blockIdx.x / a.cluster;
    int r = 0;
    while (r + 1 < a.results && a.result[r + 1].first_chunk <= id) ++r;
    const BatchResult& result = a.result[r];
    Chunk chunk;
    chunk.first_unit = int64_t(id - result.first_chunk) * result.chunk_units;
    chunk.units = int(min(int64_t(result.chunk_units), result.units - chunk.first_unit));
    chunk.rank = blockIdx.x % a.cluster, chunk.cluster = a.cluster;
    for (int i = threadIdx.x; i < 2 * kBatchWarps * kChunkUnits; i += kBatchThreads) shared.warps[0][0][i] = 0.0f;
    if (threadIdx.x < 2 * kChunkUnits) shared.units[0][threadIdx.x] = 0.0f;
    __syncthreads();

    for (int i = result.first_member; i < result.first_member + result.members; ++i) {
        const BatchMember& m = a.member[i];
        if (m.weight.dtype == DType::BFloat16)
            chunk_half<order, __nv_bfloat16>(m, chunk, shared);
        else if (m.weight.dtype == DType::Float16)
            chunk_half<order, __half>(m, chunk, shared);
        else if constexpr (order == Order::First)
            chunk_member<order, float, float, void, 4>(m, chunk, shared);
        else if constexpr (order == Order::Second)
            chunk_member<order, float, void, float, 4>(m, chunk, shared);
        else
            chunk_member<order, float, float, float, 4>(m, chunk, shared);
    }

    __syncthreads();
    const int kind = threadIdx.x / kChunkUnits, unit = threadIdx.x % kChunkUnits;
    const bool mine = kind < 2 && unit < chunk.units;
    float total = 0.0f;
    if (mine) {
        total = shared.units[kind][unit];
#pragma unroll
        for (int w = 0; w < kBatchWarps; ++w) total += shared.warps[kind][w][unit];
    }
#if __CUDA_ARCH__ >= 900
    if (a.cluster > 1) {
        auto cluster = cooperative_groups::this_cluster();
        if (mine) shared.units[kind][unit] = total;  // this thread alone read it
        cluster.sync();
        if (mine && chunk.rank == 0)
            for (int block = 1; block < a.cluster; ++block)
                total += *cluster.map_shared_rank(&shared.units[kind][unit], block);
        // A block's shared memory must outlive its readers; nothing was written that this barrier would have to show.
        asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
    }
#endif
    if (mine && chunk.rank == 0) {
        float* out = (kind ? result.signed_sum : result.fine) + chunk.first_unit + unit;
        *out = result.accumulate ? *out + total : total;
    }
}

// Launches one instantiation: the cluster is a.cluster blocks, the grid `chunks` clusters. Clusters of that size that
// the GPU holds at once.
template <Order order>
cudaLaunchConfig_t batch_config(int cluster, int64_t chunks, cudaStream_t stream, cudaLaunchAttribute& attribute) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(chunks * cluster));
    config.blockDim = dim3(kBatchThreads);
    config.dynamicSmemBytes = sizeof(BatchShared);
    config.stream = stream;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    HYWIA_CHECK_CUDA(cudaFuncSetAttribute(taylor_batch<order>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(sizeof(BatchShared))));
    return config;
}

template <Order order>
void launch_batch_of(const BatchKernelArgs& a, int64_t chunks, cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = batch_config<order>(a.cluster, chunks, stream, attribute);
    HYWIA_CHECK_CUDA(cudaLaunchKernelEx(&config, taylor_batch<order>, a));
}

template <Order order>
int resident_clusters_of(int cluster) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = batch_config<order>(cluster, 1, nullptr, attribute);
    int count = 0;
    if (cluster > 1) {
        HYWIA_CHECK_CUDA(cudaOccupancyMaxActiveClusters(&count, taylor_batch<order>, &config));
        return count;
    }
    HYWIA_CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, taylor_batch<order>, kBatchThreads,
                                                                   config.dynamicSmemBytes));
    return count * multiprocessors();
}

template <Order order>
bool clusters_compiled_of() {
    cudaFuncAttributes attributes;
    HYWIA_CHECK_CUDA(cudaFuncGetAttributes(&attributes, taylor_batch<order>));
    return attributes.ptxVersion >= 90;  // of the loaded code: an older PTX may be what runs on a newer GPU
}

#define HYWIA_DECLARE_BATCH(name)                                                            \
    void launch_batch_##name(const BatchKernelArgs& a, int64_t chunks, cudaStream_t stream); \
    int resident_clusters_##name(int cluster);                                               \
    bool clusters_compiled_##name();
HYWIA_DECLARE_BATCH(first)
HYWIA_DECLARE_BATCH(second)
HYWIA_DECLARE_BATCH(mixed)
#undef HYWIA_DECLARE_BATCH

// An order's launchers, each in its own file so that the kernels compile in parallel.
#define HYWIA_DEFINE_BATCH(name, order)                                                        \
    void launch_batch_##name(const BatchKernelArgs& a, int64_t chunks, cudaStream_t stream) {  \
        launch_batch_of<order>(a, chunks, stream);                                             \
    }                                                                                          \
    int resident_clusters_##name(int cluster) { return resident_clusters_of<order>(cluster); } \
    bool clusters_compiled_##name() { return clusters_compiled_of<order>(); }

}  // namespace hywia
