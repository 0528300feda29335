"""Turn the Python source installed on this machine into a small pre-training corpus.

The corpus holds the standard library of the running interpreter and every installed distribution with a
permissive licence. It is filtered, deduplicated, cleaned of benchmark problems, split by file, and encoded
with a byte-level BPE tokenizer trained on it::

    python recipes/corpus.py --output build/demo/corpus --exclude-jsonl HumanEval.jsonl.gz

Written: ``tokenizer.json``, ``tokenizer_config.json``, ``train.bin`` and ``heldout.bin`` (little-endian
uint16 token ids) and ``corpus.json`` (everything a model card has to state about the data).
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from cleaning import Document, benchmark_windows, examine, without_near_duplicates
from sources import STDLIB, Inventory, take_inventory
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SPECIALS = [BOS, EOS, PAD]
BOS_ID, EOS_ID = 0, 1

TEST_SHARE = 0.25  # tests kept per distribution, relative to its other code
DISTRIBUTION_SHARE = 0.15
HELDOUT_SHARE = 0.015
TOKENIZER_BYTES = 20_000_000

# A line break stands alone, so that a prompt that ends in one continues like any other text; the indentation
# after it is one piece. Digits stand alone, and one leading non-letter (space, dot, underscore, bracket) may
# join the word that follows.
SPLIT_PATTERN = r"\r?\n|[ \t]{2,}|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def collect(inventory: Inventory, args: argparse.Namespace, *, removed: Counter[str]) -> list[Document]:
    """Examine, deduplicate and balance the files of the inventory; removed counts what falls out, by reason."""
    documents = []
    with multiprocessing.Pool(args.processes) as pool:
        task = partial(examine, benchmark=args.exclude_jsonl)
        for result in pool.imap(task, inventory.sources, chunksize=64):
            if isinstance(result, Document):
                documents.append(result)
            else:
                removed[result] += 1
    print(f"{len(documents)} of {len(inventory.sources)} files pass the filters", flush=True)
    unique = without_near_duplicates(documents)
    removed["near_duplicate"] = len(documents) - len(unique)
    kept = balance(unique, args, removed=removed)
    print(f"{len(kept)} files, {total_size(kept) / 1e6:.1f} MB kept", flush=True)
    return kept


def total_size(documents: Iterable[Document]) -> int:
    """The UTF-8 bytes of all documents."""
    return sum(document.size for document in documents)


def sample(documents: list[Document], budget: float, *, seed: str) -> list[Document]:
    """A seeded sample of whole files within budget bytes; the order of the files is kept."""
    if total_size(documents) <= budget:
        return documents
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    chosen, used = [], 0
    for i in order:
        if used + documents[i].size <= budget:
            chosen.append(i)
            used += documents[i].size
    return [documents[i] for i in sorted(chosen)]


def limit_tests(documents: list[Document], *, seed: str) -> list[Document]:
    """Keep tests to a modest share of a distribution, since they repeat themselves."""
    code = [document for document in documents if not document.is_test]
    tests = [document for document in documents if document.is_test]
    return code + sample(tests, TEST_SHARE * total_size(code), seed=seed)


def largest_allowance(sizes: dict[str, int], max_bytes: int) -> float:
    """The most bytes one distribution may give, so that none exceeds its share and the total fits."""
    fixed = sizes.get(STDLIB, 0)
    others = [size for name, size in sizes.items() if name != STDLIB]
    low, high = 0.0, float(max_bytes)
    for _ in range(60):
        middle = (low + high) / 2
        total = fixed + sum(min(size, middle) for size in others)
        fits = total <= max_bytes and middle <= DISTRIBUTION_SHARE * total
        low, high = (middle, high) if fits else (low, middle)
    return low


def balance(documents: list[Document], args: argparse.Namespace, *, removed: Counter[str]) -> list[Document]:
    """Apply the test share and the distribution share; the standard library itself is kept whole."""
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.distribution].append(document)
    limited = {name: limit_tests(group, seed=f"{args.seed} tests {name}") for name, group in groups.items()}
    allowance = largest_allowance({name: total_size(group) for name, group in limited.items()}, args.max_bytes)
    kept = []
    for name, group in limited.items():
        kept += group if name == STDLIB else sample(group, allowance, seed=f"{args.seed} share {name}")
    removed["beyond_test_share"] = len(documents) - sum(map(len, limited.values()))
    removed["beyond_distribution_share"] = sum(map(len, limited.values())) - len(kept)
    return kept


def is_heldout(key: str) -> bool:
    """Whether the file of this name belongs to the held-out split, by a hash of the name alone."""
    digest = hashlib.sha256(key.lower().encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer for code with exactly vocab_size entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text has merges for {tokenizer.get_vocab_size()} entries only, not {vocab_size}")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Write ``tokenizer.json`` and the configuration that transformers reads beside it."""
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokens(tokenizer: Tokenizer, documents: Sequence[Document], *, path: Path) -> dict[str, int]:
    """Write the token ids of the documents, each between BOS and EOS, and count what was written."""
    tokenizer.encode_special_tokens = True  # source that spells a special token must not produce its id
    tokens = 0
    with path.open("wb") as file:
        for start in range(0, len(documents), 256):
            texts = [document.text for document in documents[start : start + 256]]
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array([BOS_ID, *encoding.ids, EOS_ID], dtype="<u2")
                file.write(ids.tobytes())
                tokens += len(ids)
    return {"files": len(documents), "utf8_bytes": total_size(documents), "tokens": tokens}


def distribution_table(inventory: Inventory, documents: Sequence[Document]) -> list[dict[str, object]]:
    """Name, version, licence, files and bytes of every distribution that gave something, largest first."""
    files, sizes = Counter[str](), Counter[str]()
    for document in documents:
        files[document.distribution] += 1
        sizes[document.distribution] += document.size
    return [
        {"name": name, **inventory.licences[name], "files": files[name], "bytes": size}
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]


def build(args: argparse.Namespace) -> dict[str, object]:
    """Build the corpus into ``args.output`` and return its statistics."""
    args.output.mkdir(parents=True, exist_ok=True)
    removed: Counter[str] = Counter()
    inventory = take_inventory(args.source)
    documents = collect(inventory, args, removed=removed)
    heldout = [document for document in documents if is_heldout(document.key)]
    train = [document for document in documents if not is_heldout(document.key)]
    random.Random(args.seed).shuffle(train)
    random.Random(args.seed).shuffle(heldout)
    tokenizer_sample = sample(train, TOKENIZER_BYTES, seed=f"{args.seed} tokenizer")
    tokenizer = train_tokenizer((document.text for document in tokenizer_sample), args.vocab_size)
    write_tokenizer(tokenizer, args.output)
    splits = {
        "train": write_tokens(tokenizer, train, path=args.output / "train.bin"),
        "heldout": write_tokens(tokenizer, heldout, path=args.output / "heldout.bin"),
    }
    excluded = args.exclude_jsonl
    return {
        "seed": args.seed,
        "vocab_size": args.vocab_size,
        "max_bytes": args.max_bytes,
        "files_found": len(inventory.sources),
        "files": len(documents),
        "utf8_bytes": total_size(documents),
        "tokens": sum(split["tokens"] for split in splits.values()),
        **splits,
        "heldout_bytes_per_token": splits["heldout"]["utf8_bytes"] / max(splits["heldout"]["tokens"], 1),
        "tokenizer_sample_bytes": total_size(tokenizer_sample),
        "benchmark": {"file": excluded.name, "windows": len(benchmark_windows(excluded))} if excluded else None,
        "removed": dict(sorted(removed.items())),
        "distributions": distribution_table(inventory, documents),
        "refused_distributions": dict(sorted(inventory.refused.items())),
    }


def site_packages() -> list[str]:
    """The site-packages of this interpreter and, in a virtual environment, of the one beneath it."""
    return [sysconfig.get_path("purelib", vars={"base": base}) for base in (sys.prefix, sys.base_prefix)]


def main() -> None:
    """Build the corpus and write its statistics."""
    parser = argparse.ArgumentParser(description="Build a corpus from the Python source on this machine.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=1024, help="at most 65536")
    parser.add_argument("--source", action="append", help="site-packages folder, repeatable; default: this Python's")
    parser.add_argument("--exclude-jsonl", type=Path, help="HumanEval.jsonl.gz, whose problems to keep out")
    parser.add_argument("--max-bytes", type=int, default=120_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.source = args.source or site_packages()
    statistics = build(args)
    text = json.dumps(statistics, indent=2, ensure_ascii=False) + "\n"
    (args.output / "corpus.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
