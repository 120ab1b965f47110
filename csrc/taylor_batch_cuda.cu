// Taylor importance of many matrices on the GPU: which matrices one launch takes, and how it is cut.
// The kernel itself is in taylor_batch.cuh.
#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <tuple>
#include <vector>

#include "taylor_batch.cuh"

namespace hywia {
namespace {

int64_t width_of(const TaylorBatchMatrix& m) { return m.weight.dtype == DType::Float32 ? 4 : 8; }  // of a 16-byte word

bool along_rows(const TaylorBatchMatrix& m) {
    return m.reduce % width_of(m) == 0 &&
           all_operands(m, [](const Operand& x) { return x.reduce_stride == 1 && aligned(x, x.unit_stride); });
}

bool along_columns(const TaylorBatchMatrix& m, int64_t units) {
    return units * m.group_size % width_of(m) == 0 &&
           all_operands(m, [](const Operand& x) { return x.unit_stride == 1 && aligned(x, x.reduce_stride); });
}

bool clusters_compiled(Order order) {
    return order == Order::First    ? clusters_compiled_first()
           : order == Order::Second ? clusters_compiled_second()
                                    : clusters_compiled_mixed();
}

// Clusters of `cluster` blocks that the current GPU holds at once; the driver is asked once.
int resident_clusters(Order order, int cluster) {
    static std::mutex mutex;
    static std::map<std::tuple<int, Order, int>, int> known;
    int device = 0;
    HYWIA_CHECK_CUDA(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(device, order, cluster);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    int count = 0;
    if (cluster == 1 || clusters_compiled(order))
        count = order == Order::First    ? resident_clusters_first(cluster)
                : order == Order::Second ? resident_clusters_second(cluster)
                                         : resident_clusters_mixed(cluster);
    return known[key] = count;
}

// The largest cluster with which all chunks run at once: blocks that start together share the memory evenly and end
// together, while a second wave would leave most of the GPU idle. More chunks than that do without clusters.
int cluster_for(Order order, int64_t chunks) {
    for (int cluster = kMaxCluster; cluster > 1; --cluster)
        if (chunks <= resident_clusters(order, cluster)) return cluster;
    return 1;
}

// Units of a chunk: columns are read in 256 bytes side by side, and start where a 16-byte word does.
int64_t chunk_units(const TaylorBatchMatrix* matrices, const TaylorBatchResult& result) {
    int64_t lines = kChunkUnits, group = 1, step = 1;
    for (int64_t i = 0; i < result.matrices; ++i) {
        const TaylorBatchMatrix& m = matrices[result.first_matrix + i];
        group = std::max(group, m.group_size);
        if (along_rows(m)) continue;
        lines = std::min(lines, 16 * width_of(m));
        step = std::max(step, width_of(m) / std::gcd(width_of(m), m.group_size));  // powers of two
    }
    return std::max(step, lines / group / step * step);
}

int64_t chunks_of(const TaylorBatchMatrix* matrices, const TaylorBatchResult& result) {
    return divide_up(result.units, chunk_units(matrices, result));
}

// Parts of a row: the fewest that give the warps of the cluster nearly equal shares of the chunk.
int parts_of(const TaylorBatchMatrix& m, int64_t lines, int cluster) {
    const int64_t warps = int64_t(cluster) * kBatchWarps, most = m.reduce / width_of(m) / 64;
    int best = 1;
    double best_waste = 1e30;
    for (int parts = 1; parts <= std::clamp<int64_t>(most, 1, 16); ++parts) {
        const double waste = double(divide_up(lines * parts, warps) * warps) / double(lines * parts);
        if (waste < best_waste - 0.02) best = parts, best_waste = waste;
    }
    return best;
}

class Launch {
public:
    Launch(Order order, cudaStream_t stream) : order_(order), stream_(stream) {}

    void add(const TaylorBatchMatrix* matrices, const TaylorBatchResult& result) {
        for (int64_t done = 0; done < result.matrices;) {
            if (args_.results == kBatchMembers || members_ == kBatchMembers) flush();
            TaylorBatchResult part = result;  // the matrices of one result may fill several launches
            part.first_matrix += done;
            part.matrices = std::min<int64_t>(result.matrices - done, kBatchMembers - members_);
            part.accumulate = result.accumulate || done > 0;
            add_part(matrices, part);
            done += part.matrices;
        }
    }

    void flush() {
        if (args_.results == 0) return;
        args_.cluster = cluster_for(order_, chunks_);
        if (chunks_ * args_.cluster > 0x7fffffff)
            throw std::runtime_error("weights: too many units for one launch of the cuda backend");
        for (int r = 0; r < args_.results; ++r) {
            const BatchResult& result = args_.result[r];
            for (int i = result.first_member; i < result.first_member + result.members; ++i)
                args_.member[i].parts =
                    int16_t(parts_of(source_[i], int64_t(result.chunk_units) * source_[i].group_size, args_.cluster));
        }
        if (order_ == Order::First)
            launch_batch_first(args_, chunks_, stream_);
        else if (order_ == Order::Second)
            launch_batch_second(args_, chunks_, stream_);
        else
            launch_batch_mixed(args_, chunks_, stream_);
        args_.results = 0, members_ = 0, chunks_ = 0;
    }

private:
    void add_part(const TaylorBatchMatrix* matrices, const TaylorBatchResult& part) {
        BatchResult& result = args_.result[args_.results++];
        result.fine = part.fine, result.signed_sum = part.signed_sum, result.accumulate = part.accumulate;
        result.units = part.units;
        result.first_member = members_, result.members = int32_t(part.matrices);
        result.first_chunk = int32_t(chunks_), result.chunk_units = int32_t(chunk_units(matrices, part));
        chunks_ += chunks_of(matrices, part);
        for (int64_t i = 0; i < part.matrices; ++i) {
            const TaylorBatchMatrix& m = matrices[part.first_matrix + i];
            source_[members_] = m;
            args_.member[members_++] = {m.weight, m.grad, m.fisher, m.reduce, int32_t(m.group_size), 1, along_rows(m)};
        }
    }

    Order order_;
    cudaStream_t stream_;
    BatchKernelArgs args_ = {};
    TaylorBatchMatrix source_[kBatchMembers];
    int members_ = 0;
    int64_t chunks_ = 0;
};

}  // namespace

bool taylor_batch_takes(const TaylorBatchMatrix* matrices, const TaylorBatchResult& result) {
    if (result.units == 0 || result.matrices == 0) return false;
    for (int64_t i = 0; i < result.matrices; ++i) {
        const TaylorBatchMatrix& m = matrices[result.first_matrix + i];
        if (m.reduce == 0 || m.group_size > 0x7fffffff / kChunkUnits) return false;
        if (!along_rows(m) && !along_columns(m, result.units)) return false;
    }
    return chunks_of(matrices, result) * kMaxCluster <= 0x7fffffff;
}

void taylor_batch_cuda(const TaylorBatchMatrix* matrices, const TaylorBatchResult* results, int64_t count, Order order,
                       void* stream) {
    Launch launch(order, static_cast<cudaStream_t>(stream));
    for (int64_t r = 0; r < count; ++r) launch.add(matrices, results[r]);
    launch.flush();
}

}  // namespace hywia
