"""Config of a Nemotron-NAS (DeciLM) checkpoint: LLaMA's fields, and each layer's widths in `block_configs`.

It travels in the checkpoint, since transformers has no such class. vLLM reads the blocks as attributes.
"""

from types import SimpleNamespace

from transformers import PretrainedConfig


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**values) for part, values in block.items()})
            for block in block_configs or ()
        ]

    def to_dict(self):
        blocks = self.__dict__.pop("block_configs", [])
        try:
            values = super().to_dict()
        finally:
            self.block_configs = blocks
        values["block_configs"] = [{part: dict(vars(fields)) for part, fields in vars(b).items()} for b in blocks]
        return values
