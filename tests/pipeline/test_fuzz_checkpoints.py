"""Directories with anything in their JSON files: a loaded model, or a HywiaError; never another exception, and never
code that ran.

HYWIA_FUZZ raises the number of examples; those that failed once are kept as examples.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint import description, description_text, loaded_weights
from tests.support.tiny import Tiny

EXAMPLES = int(os.environ.get("HYWIA_FUZZ", "50"))
TINY = Tiny("fuzz", heads=4, kv_heads=2, tied=False, layers=2, hidden=16, head_dim=4, intermediate=12)
INDEX = "model.safetensors.index.json"
FILES = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    INDEX,
    "adapter_config.json",
    "tokenizer.json",
)
KEYS = (
    *("model_type", "base_model_type", "module_changes", "auto_map", "architectures", "quantization_config"),
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "dtype"),
    *("torch_dtype", "tie_word_embeddings", "hidden_act", "rms_norm_eps", "attn_implementation", "text_config"),
    *("_attn_implementation", "attention_bias", "transformers_weights", "fusion_config", "per_layer_config"),
    *("weight_map", "metadata", "tokenizer_class", "chat_template", "added_tokens_decoder", "bos_token", "eos_token"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "temperature", "max_length", "model_max_length", "do_sample"),
    *("base_model_name_or_path", "custom_generate", "use_cache", "sliding_window", "layer_types", "name_or_path"),
    *("vision_config", "id2label", "num_labels", "is_decoder", "sub_configs", "attribute_map", "__class__", "to_dict"),
    *("model", "added_tokens", "version", "normalizer", "pre_tokenizer", "post_processor", "decoder", "extra_files"),
)
WORDS = (
    *("llama", "mistral", "gpt2", "gemma3", "mixtral", "baichuan", "hywia_adaptive", "cohere", "evil.Evil", "sdpa"),
    *("someone/else--evil.Evil", "../evil.Evil", "model.safetensors", "pytorch_model.bin", "gptq", "float16", "load"),
    *("model.layers.0.mlp", "yarn", "LlamaTokenizer", "LlamaForCausalLM", "silu", "<s>", "someone/kernel", ""),
)
MAPS = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel"), "evil.Evil")

plain = (
    st.none()
    | st.booleans()
    | st.integers(-4, 70)
    | st.sampled_from((10**6, 2**31, 2**63, 10**30, -1, 0, 259, 258))
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
values = st.recursive(
    plain | st.just(MAPS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
edits = st.lists(
    st.tuples(st.sampled_from(FILES), st.sampled_from(KEYS) | st.text(max_size=8), values), min_size=1, max_size=4
)
wholes = st.tuples(st.sampled_from((*FILES, "model.safetensors")), st.binary(max_size=80) | values)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("fuzz") / "pristine"
    TINY.build().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'mark')!r}, 'w')\nclass Evil: pass\n")
    return folder


def changed(pristine, edits, whole):
    """A copy of the directory with fields of its files set, and perhaps one file replaced."""
    folder = pristine.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    for file, key, value in edits:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, key: value}))
    if whole is not None:
        file, content = whole
        (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def judge(folder):
    """What `load` asks of a directory before transformers makes anything of it."""
    values = description.read_config(folder)
    description.check_directory(folder)
    description_text.check_generation(folder)
    method = description.quantisation(values)
    description.check_code(values, "config.json")
    description.check_code(description_text.tokenizer_config(folder), "tokenizer_config.json")
    tensors = loaded_weights.check_stored(folder, values, method is not None)
    description_text.check_tokenizer(folder, str(folder))
    return description.family(values), len(tensors)


usual = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES == 50, database=None)


@settings(usual, max_examples=EXAMPLES)
@given(edits, st.none() | wholes)
@example([("config.json", "vocab_size", 259)], None)
@example([("config.json", "text_config", {"text_config": {"text_config": {}}})], None)
@example([(INDEX, "weight_map", {"a": "\0"})], None)
def test_judging(pristine, edits, whole):
    folder = changed(pristine, edits, whole)
    try:
        family, tensors = judge(folder)
    except HywiaError as refused:
        text = str(refused)
        assert text.startswith(("model: ", "tokenizer: ")), text
    else:
        assert family in description.model_types() or description.derivable(family)
        assert tensors >= 1
    assert not (pristine.parent / "mark").exists()


@settings(usual, max_examples=max(EXAMPLES // 5, 30))
@given(edits, st.none() | wholes, st.booleans())
@example([("config.json", "auto_map", MAPS), ("config.json", "module_changes", {})], None, True)
@example([("config.json", "vocab_size", 10**6)], None, False)
@example([("tokenizer_config.json", "tokenizer_class", "LlamaForCausalLM")], None, False)
def test_loading(pristine, edits, whole, trust):
    folder = changed(pristine, edits, whole)
    types = [e[2] for e in edits if e[1] in ("model_type", "base_model_type")]
    trust = trust and "baichuan" not in types  # the one family whose code trust runs
    try:
        model, tokenizer = hk.load(folder, trust_remote_code=trust)
    except HywiaError as refused:
        text = str(refused)
        assert text.startswith(("model: ", "tokenizer: ", "module_changes: ")), text
    else:
        assert type(model).__module__.startswith(("transformers.", "hywia_kernels."))
        assert len(tokenizer) >= 0
    assert not (pristine.parent / "mark").exists()
