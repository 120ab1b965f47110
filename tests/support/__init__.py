"""What tests of several folders need: operands, tiny models, tokenizers, the statistics' meaning, comparisons."""
