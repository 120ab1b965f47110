"""A stand-in with the structure of Baichuan-13B: W_pack, ALiBi added to the mask that every layer gets, gated MLP."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_baichuan import BaichuanConfig


def slopes(heads):
    """A geometric sequence for a power of two of heads, and every other one of the next for the rest."""
    below = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(heads - below)]
    return torch.tensor(first + between)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BaichuanAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.W_pack = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        samples, tokens, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).unflatten(-1, (3, self.hidden_size))
        q, k, v = (packed[..., i, :].view(samples, tokens, self.num_heads, -1).transpose(1, 2) for i in range(3))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
        weights = q @ k.transpose(2, 3) / math.sqrt(self.head_dim) + attention_mask[..., -tokens:, :]
        out = torch.softmax(weights.float(), dim=-1).to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).reshape(samples, tokens, self.hidden_size))


class BaichuanLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        hidden_states = hidden_states + self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.n_head = config.num_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BaichuanLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def alibi_mask(self, length, reference):
        positions = torch.arange(length, device=reference.device)
        future = torch.full((length, length), float("-inf"), device=reference.device).triu(1)
        biases = slopes(self.n_head).to(reference.device)[:, None, None] * (positions[None, :] - length + 1)
        return (future + biases).to(reference.dtype)

    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None, use_cache=False, **kwargs):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = self.alibi_mask(seen + hidden.shape[1], hidden)
        for layer in self.layers:
            (hidden,) = layer(hidden, attention_mask=mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, inputs_embeds=None, **kwargs):
        out = self.model(input_ids, inputs_embeds, past_key_values, bool(use_cache))
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)
