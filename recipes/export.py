"""Write a trained demo target as a Hugging Face checkpoint: config, bfloat16 weights, tokenizer.

python recipes/export.py --state build/demo/target --corpus build/demo/corpus --output build/demo/model
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from target import CONTEXT, Plan, build_model, hf_config

from kangaroo.model.weights import save_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder written by pretrain.py")
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    args = parser.parse_args()
    plan = Plan(**json.loads((args.state / "progress.json").read_text())["plan"])
    vocab_size = len(json.loads((args.corpus / "tokenizer.json").read_text())["model"]["vocab"])
    model = build_model(plan, vocab_size)
    tensors = load_file(args.state / "state.safetensors")
    with torch.no_grad():
        for name, parameter in model.parameters():
            parameter.copy_(tensors[name])
    save_checkpoint(model, args.output, raw_config=hf_config(plan, vocab_size), dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.corpus / name, args.output / name)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_length": CONTEXT}
    (args.output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    main()
