// Taylor importance of many matrices, order "second".
#include "taylor_batch.cuh"

namespace hywia {
HYWIA_DEFINE_BATCH(second, Order::Second)
}  // namespace hywia
