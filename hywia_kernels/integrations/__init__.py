"""Scorers for other pruning tools: their classes' signatures over this package's kernels.

    from hywia_kernels.integrations import torch_pruning as importance    # instead of tp.importance
    from hywia_kernels.integrations import llm_pruner                     # instead of hf_llama_pruner

Neither tool is imported before its module here is. `modules` reads a layer's weight as a matrix with channels along
both axes, `measured` holds what one calibration pass left, `placement` maps a member's channels to its group's.
"""
