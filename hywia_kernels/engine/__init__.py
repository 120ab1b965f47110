"""How `calibrate` gets its statistics: the calibration set, what a model does while it is measured, and the passes.

    samples                      the calibration set as the passes take it
    loss                         the loss, and its gradient at the final hidden states
    results                      the statistics while they grow, on the matrices' devices
    host, memory                 the memory that is free, what each pass needs, and which one fits
    recompute                    functions whose outputs are computed again in backward instead of kept
    launch, kernels_triton       Triton's kernels, and how they are launched
    kernels, rotary              norm, gate and rotary embedding in one launch each, on CUDA
    patches, passes              what a pass changes of a model and of the process, and how all of it is put back
    experts                      experts and routers of a layer, for all passes
    whole, autograd              a pass over the whole graph, and the reference pass
    linear, gated, flash, block  what the fused passes put in the place of modules' forwards
    instrument                   which of these stands in for which module
    layered                      the fused pass that runs one decoder layer at a time

A module imports only from modules above it or to its left.
"""
