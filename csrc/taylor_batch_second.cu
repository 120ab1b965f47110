// Taylor importance of many matrices, order "second".
#include "taylor_batch.cuh"

namespace hywia {

void launch_batch_second(const BatchKernelArgs& a, int64_t chunks, cudaStream_t stream) {
    launch_batch_of<Order::Second>(a, chunks, stream);
}
int resident_clusters_second(int cluster) { return resident_clusters_of<Order::Second>(cluster); }
bool clusters_compiled_second() { return clusters_compiled_of<Order::Second>(); }

}  // namespace hywia
