"""How `calibrate` gets its statistics: the calibration set, what a model does while it is measured, and the passes.

    samples     the set as the passes take it        memory   what a pass will need, and which one fits
    loss        gradient at the final hidden states  results  the statistics while they grow, on the matrices' devices
    patches     a model for a while: frozen, other `forward`s, reproducible kernels
    experts     experts and routers of a layer, for all passes
    autograd    reference pass: per-sample gradients of one matrix at a time
    linear, recompute, gated, instrument              what the fused passes put in the place of modules' forwards
    whole, layered                                    fused passes: whole graph at once, and one decoder layer at a time
    kernels, rotary, kernels_triton                   norm, gate and rotary embedding in one launch each, on CUDA

Imports go down this list, never up.
"""
