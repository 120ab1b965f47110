// Taylor importance of many matrices, order "mixed".
#include "taylor_batch.cuh"

namespace hywia {

void launch_batch_mixed(const BatchKernelArgs& a, int64_t chunks, cudaStream_t stream) {
    launch_batch_of<Order::Mixed>(a, chunks, stream);
}
int resident_clusters_mixed(int cluster) { return resident_clusters_of<Order::Mixed>(cluster); }
bool clusters_compiled_mixed() { return clusters_compiled_of<Order::Mixed>(); }

}  // namespace hywia
