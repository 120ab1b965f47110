"""A model of your own, made smaller and trained back: what `hywia prune MODEL -o OUT --recover` does, in Python.

    pip install '.[recover]'                                         # in a clone of the repository
    python examples/prune_and_recover.py MODEL -o OUT --ratio 0.3
    python examples/prune_and_recover.py MODEL -o OUT --ratio 0.3 --text text.jsonl --tokens 1000000

Without `--text` the model writes the text that it is scored and trained on.
"""

from __future__ import annotations

import argparse

import hywia_kernels as hk


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, directory or .gguf file")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--ratio", type=float, default=0.3, help="share of all parameters to remove")
    parser.add_argument("--text", help="a text file or data set")
    parser.add_argument("--tokens", type=int, help="to train on; default: by the model and the device")
    arguments = parser.parse_args(argv)

    model, tokenizer = hk.load(arguments.model)
    recovery = hk.Recovery(tokens=arguments.tokens, text=(arguments.text or "self",))
    recipe = hk.Recipe(ratio=arguments.ratio, calibration=arguments.text, recover=recovery)
    result = hk.compress(
        model,
        tokenizer,
        recipe,
        evaluation=hk.Evaluation(),  # perplexity on the prose that comes with the package
        when_planned=lambda plan: print(f"removes {plan.ratio:.1%} of the parameters"),
        on_progress=lambda work, done, of: print(f"{work}: {done} of {of}") if done == of else None,
    )
    apart = [value for _, value in result.record["recovery"]["divergences"]]
    print(f"divergence from the dense model: {apart[0]:.3f} -> {min(apart):.3f} nats a token")
    print(f"perplexity: {result.before['perplexity']:.1f} -> {result.after['perplexity']:.1f}")
    hk.save(model, tokenizer, arguments.output, result=result)
    print(f"wrote {arguments.output}, which AutoModelForCausalLM.from_pretrained loads")


if __name__ == "__main__":
    main()
