"""Scoring of models larger than a GPU, by one process or by several.

    launch    which of torchrun's processes this is
    runs      the calibration set in pieces that depend on the model and the set alone
    sums      what one layer's statistics are while they are added up
    ranks     the processes that share one scoring: what they agree on, and who is missing
    stored    where layers are read from: pinned memory, or a stored model's files
    weights   layers' weights, each at hand while its layer runs
    slots     layers on their way to a device, two at a time
    shards    layers that the processes of a host hold together, and gather
    place     where the weights stay, by what is free
    work      what a stopped run goes on from
    agreement whether all processes read the same weights
    operands  operands of a layer's matrices, kept until all runs have brought theirs
    exchange  orders that do not add up over samples: operands change hands, and processes score some units each
    layers    the streamed pass: forward, then backward, a layer at a time for all samples
    scoring   one scoring: what its processes agree on, the pass, its statistics
    job       calibrate_streamed

The pass keeps what enters each layer, runs the layers forward and then backward with recomputation, and needs one
layer's weights at a time. A run's sums are added in float64 in the order of the runs, so that the statistics are the
same bits whatever number of processes took part and wherever the weights were.
"""
