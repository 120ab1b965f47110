"""What scorers see of LLM-Pruner: handlers, groups, and a pruner's way with scores. For tests without its repository.

Written from the contract's description, not from its source; the formulas are the naive ones.
"""
