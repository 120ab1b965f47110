// Taylor importance of many matrices, order "first".
#include "taylor_batch.cuh"

namespace hywia {

void launch_batch_first(const BatchKernelArgs& a, int64_t chunks, cudaStream_t stream) {
    launch_batch_of<Order::First>(a, chunks, stream);
}
int resident_clusters_first(int cluster) { return resident_clusters_of<Order::First>(cluster); }
bool clusters_compiled_first() { return clusters_compiled_of<Order::First>(); }

}  // namespace hywia
