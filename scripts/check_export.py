#!/usr/bin/env python3
"""Proves that an exported folder is what other tools understand: loads it with transformers (or peft) and compares
its next-token logprobs with the engine's own.

    rft-engine logprobs --model runs/x/final --data rows.jsonl > engine.jsonl
    scripts/check_export.py runs/x/final --data rows.jsonl --logprobs engine.jsonl

`rows.jsonl` holds {id, tokens, prompt_tokens} or the output of `rft-engine generate`; `engine.jsonl` holds
{id, logprobs} for the tokens after the prompt. With --base, FOLDER is a PEFT adapter on that base model.
The first run makes a virtual environment with torch, transformers and peft (5 GB) in --venv. Not part of CI.
"""

import argparse
import json
import os
import subprocess
import sys

PACKAGES = ["torch==2.15.0", "transformers==5.23.0", "peft==0.21.2"]


def enter_venv(folder):
    """Runs this script again with the interpreter of the environment, made first if it is not there."""
    python = os.path.join(os.path.abspath(folder), "bin", "python")
    if not os.path.exists(python):
        print(f"making {folder} with {', '.join(PACKAGES)} …", file=sys.stderr)
        subprocess.check_call([sys.executable, "-m", "venv", folder])
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", *PACKAGES])
    if os.environ.get("CHECK_EXPORT_PYTHON") != python:
        os.environ["CHECK_EXPORT_PYTHON"] = python
        os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])


def rows_of(path):
    """The objects of a JSONL file by id, in order."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return {str(row["id"]): row for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the exported model (or adapter) folder")
    parser.add_argument("--data", required=True, help="rows with tokens and prompt_tokens")
    parser.add_argument("--logprobs", required=True, help="what `rft-engine logprobs` printed for them")
    parser.add_argument("--base", help="base model folder, if FOLDER is a PEFT adapter")
    parser.add_argument("--atol", type=float, default=1e-3, help="allowed absolute difference of one logprob")
    parser.add_argument("--text", help="also check that the tokenizer gives this text back")
    parser.add_argument("--venv", default="target/check-export-venv")
    args = parser.parse_args()
    enter_venv(args.venv)

    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = args.base or args.folder
    model, info = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    trouble = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if trouble:
        sys.exit(f"FAIL: transformers does not load every weight as it stands: {trouble}")
    if args.base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.folder)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder if not args.base else base)
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"tokenizer of {len(tokenizer)}, eos {model.generation_config.eos_token_id}")
    if args.text is not None:
        ids = tokenizer(args.text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == args.text, (ids, tokenizer.decode(ids))

    engine, worst, total, count = rows_of(args.logprobs), 0.0, 0.0, 0
    for key, row in rows_of(args.data).items():
        got = engine.get(key)
        if got is None:
            sys.exit(f"FAIL: row {key} is not in {args.logprobs}")
        tokens = row["tokens"]
        if "prompt_tokens" in row and isinstance(row["prompt_tokens"], int):
            first = row["prompt_tokens"]
        else:  # the output of `generate`: `tokens` are the completion alone
            prompt = row.get("prompt_ids") or tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            first, tokens = len(prompt), prompt + tokens
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].float()
        want = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[first - 1:, 0]
        have = torch.tensor(got["logprobs"])
        if have.shape != want.shape:
            sys.exit(f"FAIL: row {key}: {have.numel()} logprobs, expected {want.numel()}")
        if want.numel():
            difference = (have - want).abs()
            worst, total, count = max(worst, difference.max().item()), total + difference.sum().item(), count + want.numel()
    if count == 0:
        sys.exit("FAIL: there is no token to compare")
    print(f"{count} logprobs: largest difference {worst:.2e}, mean {total / count:.2e} (allowed {args.atol:.0e})")
    if not worst <= args.atol:
        sys.exit("FAIL: they differ")
    print("OK")


if __name__ == "__main__":
    main()
