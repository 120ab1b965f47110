// Taylor importance of many matrices, order "first".
#include "taylor_batch.cuh"

namespace hywia {
HYWIA_DEFINE_BATCH(first, Order::First)
}  // namespace hywia
