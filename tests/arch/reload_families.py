"""Run in a fresh process: load checkpoints, stock ones without this package, and write their logits and what they go on
with.

usage: reload_families.py JOBS.json; each job has `folder`, `out` and `stock`.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def answer(job, tokens):
    model = AutoModelForCausalLM.from_pretrained(job["folder"]).eval()
    with torch.no_grad():
        torch.save(model(tokens).logits, job["out"])
    ids = model.generate(tokens[:2], attention_mask=torch.ones_like(tokens[:2]), do_sample=False, max_new_tokens=6)
    return {"class": type(model).__name__, "ids": ids.tolist()}


def main() -> None:
    with open(sys.argv[1]) as file:
        content = json.load(file)
    tokens, jobs, results = torch.tensor(content["tokens"]), content["jobs"], {}
    for i in sorted(range(len(jobs)), key=lambda i: not jobs[i]["stock"]):
        if jobs[i]["stock"]:
            assert not any(name.startswith("hywia") for name in sys.modules), (
                "a stock checkpoint pulled this package in"
            )
        else:
            import hywia_kernels  # noqa: F401
        results[i] = answer(jobs[i], tokens)
    print(json.dumps([results[i] for i in range(len(jobs))]))


if __name__ == "__main__":
    main()
