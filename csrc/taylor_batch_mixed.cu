// Taylor importance of many matrices, order "mixed".
#include "taylor_batch.cuh"

namespace hywia {
HYWIA_DEFINE_BATCH(mixed, Order::Mixed)
}  // namespace hywia
