"""Run in a fresh process: load checkpoints with stock transformers alone and write their logits.

usage: reload.py JOBS.json; each job has `folder`, `tokens`, `out`, and may have the `dtype` to compute in.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    results = []
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        model = AutoModelForCausalLM.from_pretrained(job["folder"]).eval()
        if "dtype" in job:
            model.to(getattr(torch, job["dtype"]))
        tokens = torch.tensor(job["tokens"])
        with torch.no_grad():
            torch.save(model(tokens).logits, job["out"])
        ids = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), do_sample=False, max_new_tokens=8)
        results.append({"class": type(model).__name__, "ids": ids[0].tolist()})
    assert not any(name.startswith("hywia") for name in sys.modules), "the checkpoint pulled this package in"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
