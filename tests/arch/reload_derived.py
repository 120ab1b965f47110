"""Run in a fresh process: load what was saved of derived families, and write logits and what follows, with and without
a cache.

usage: reload_derived.py JOBS.json; each job has `folder` and `out`.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import hywia_kernels  # noqa: F401  checkpoints whose layers differ are loaded by it


def main() -> None:
    with open(sys.argv[1]) as file:
        content = json.load(file)
    tokens, results = torch.tensor(content["tokens"]), []
    for job in content["jobs"]:
        try:
            auto = AutoModelForImageTextToText if job.get("images") else AutoModelForCausalLM
            model = auto.from_pretrained(job["folder"]).eval()
            with torch.no_grad():
                torch.save(model(input_ids=tokens, use_cache=False).logits, job["out"])
            ids = [
                model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    max_new_tokens=6,
                    use_cache=cached,
                    eos_token_id=None,
                ).tolist()
                for cached in (True, False)
            ]
            results.append({"cached": ids[0], "plain": ids[1], "class": type(model).__name__})
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
