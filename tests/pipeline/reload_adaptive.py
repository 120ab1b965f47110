"""Run in a fresh process: load checkpoints by the auto classes and write their logits.

usage: reload_adaptive.py MODE JOBS.json; MODE is "import" (hywia_kernels is imported first), "after" (transformers
first) or "remote" (hywia_kernels cannot be imported; trust_remote_code=True).
"""

import json
import sys
from pathlib import Path

mode, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
if mode == "remote":
    sys.modules["hywia_kernels"] = None  # an import of it raises
elif mode == "import":
    import hywia_kernels

    assert "transformers" not in sys.modules

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

if mode == "after":
    import hywia_kernels  # noqa: F401


def same_gradients(model, tokens):
    """With gradient checkpointing and without."""
    model.train()
    found = []
    for checkpointing in (True, False):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


results = []
for job in jobs:
    options = {"trust_remote_code": True} if mode == "remote" else {}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **options, **job.get("options", {})).eval()
    tokens = torch.tensor(job["tokens"])
    with torch.no_grad():
        torch.save(model(tokens).logits, job["out"])
    if job.get("logits_only"):
        results.append({"module": type(model).__module__})
        continue
    ids = {}
    for cache in (None, "static"):
        out = model.generate(
            tokens[:1],
            attention_mask=torch.ones_like(tokens[:1]),
            do_sample=False,
            max_new_tokens=8,
            cache_implementation=cache,
        )
        ids[str(cache)] = out[0].tolist()
    devices = len(set(getattr(model, "hf_device_map", {}).values()))
    gradients = devices > 1 or same_gradients(model, tokens)
    results.append(
        {
            "ids": ids,
            "dtype": str(model.dtype),
            "gradients": gradients,
            "devices": devices,
            "module": type(model).__module__,
        }
    )
print(json.dumps(results))
