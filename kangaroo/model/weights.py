"""Safetensors checkpoints, from a local folder or the hub, into our parameters and back; never pickle."""

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kangaroo.errors import CheckpointError
from kangaroo.kernels import REFERENCE, reference
from kangaroo.model.config import ModelConfig
from kangaroo.model.transformer import Layer, Transformer

# Never *.safetensors, which would fetch the weights again in other layouts (consolidated.safetensors, original/).
HUB_FILES = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
             "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt",
             "adapter/config.json", "adapter/adapter.safetensors",
             "medusa/config.json", "medusa/heads.safetensors"]  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What weights may be kept in; int8 has one scale per output.
STORAGES = (*DTYPES, "int8")


def resolve_folder(model: str) -> Path:
    """The local folder of a checkpoint: the folder itself, or the hub's snapshot of a 'name/model' id.

    Raises CheckpointError where neither exists. HF_HUB_OFFLINE keeps the hub library to its cache.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or folder.is_absolute() or model.startswith("."):
        raise CheckpointError(f"no such model folder: {model}; give a folder, a hub id like org/name, or 'demo'")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no folder {model} here, and the hub has no usable copy: {reason}") from error


def load_transformer(
    folder: Path, config: ModelConfig, *, storage: str, device: torch.device, backend: str = REFERENCE
) -> Transformer:
    """Load the model of a checkpoint folder, weights kept in storage (STORAGES), norms in float32.

    backend: "reference", or "native" for packed weights on the CPU, which decode but do not train.
    Raises CheckpointError where files are missing or damaged, or names or shapes disagree with config.
    """
    tensors = _read_tensors(folder, expected_shapes(config))
    if backend == REFERENCE:
        return assemble(tensors, config, storage=storage, device=device)
    # Here, because the native kernels may not be built.
    from kangaroo.model.packed import PackedTransformer

    base = DTYPES.get(storage, torch.float32)
    layers = read_layers(tensors, config, convert=lambda weight: weight.to(base))
    embedding = tensors["model.embed_tokens.weight"].to(base)
    head = embedding if config.tied_head else tensors["lm_head.weight"].to(base)
    final_norm = tensors["model.norm.weight"].float() + config.norm_offset
    return PackedTransformer(config, layers, embedding=embedding, final_norm=final_norm, head=head, storage=storage)


def save_checkpoint(model: Transformer, folder: Path, *, raw_config: Mapping[str, object], dtype: torch.dtype) -> None:
    """Write model.safetensors and config.json in Hugging Face's layout, every weight rounded to dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in disassemble(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(raw_config), indent=2) + "\n", encoding="utf-8")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this configuration must hold."""
    size, inner = config.hidden_size, config.intermediate_size
    query, keyed = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, size)}
    shapes["model.norm.weight"] = (size,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, size)
    linears = {
        "self_attn.q_proj": (query, size),
        "self_attn.k_proj": (keyed, size),
        "self_attn.v_proj": (keyed, size),
        "self_attn.o_proj": (size, query),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    for layer_id in range(config.num_layers):
        prefix = f"model.layers.{layer_id}."
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if _has_bias(config, name):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name, source in _norm_names(config).items():
            length = config.head_dim if name in ("query_norm", "key_norm") else size
            shapes[f"{prefix}{source}.weight"] = (length,)
    return shapes


def assemble(tensors: Mapping[str, Tensor], config: ModelConfig, *, storage: str, device: torch.device) -> Transformer:
    """A Transformer on the reference kernels from tensors in a checkpoint's names (expected_shapes)."""
    base = DTYPES.get(storage, torch.float32)

    def prepare(weight: Tensor) -> Tensor:
        return reference.prepare(weight.to(base).to(device), storage=storage)

    remaining = dict(tensors)
    embedding = prepare(remaining["model.embed_tokens.weight"])
    head = embedding if config.tied_head else prepare(remaining["lm_head.weight"])
    final_norm = (remaining["model.norm.weight"].float() + config.norm_offset).to(device)
    layers = list(read_layers(remaining, config, convert=prepare))
    return Transformer(config, layers, embedding=embedding, final_norm=final_norm, head=head)


def read_layers(
    tensors: MutableMapping[str, Tensor], config: ModelConfig, *, convert: Callable[[Tensor], Tensor]
) -> Iterator[Layer]:
    """The layers of a checkpoint's tensors one by one, taking each out of tensors; weights and biases are converted."""

    def take(names: list[str], kind: str) -> Tensor:
        return convert(torch.cat([tensors.pop(f"{name}.{kind}") for name in names]))

    for layer_id in range(config.num_layers):
        prefix = f"model.layers.{layer_id}."
        fields: dict[str, Tensor] = {}
        for field, names in _STACKS.items():
            stacked = [prefix + name for name in names]
            fields[field] = take(stacked, "weight")
            if _has_bias(config, names[0]):
                fields[f"{field}_bias"] = take(stacked, "bias")
        for field, name in _norm_names(config).items():
            norm = tensors.pop(f"{prefix}{name}.weight").float() + config.norm_offset
            fields[field] = norm.to(fields["qkv"].device)
        yield Layer(**fields)


def disassemble(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint's names: assemble() backwards."""
    model.require_reference("save")
    config = model.config
    shapes = expected_shapes(config)
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm - config.norm_offset}
    if not config.tied_head:
        tensors["lm_head.weight"] = model.head
    for layer_id, layer in enumerate(model.layers):
        prefix = f"model.layers.{layer_id}."
        present = layer.tensors()
        for field, names in _STACKS.items():
            sizes = [shapes[f"{prefix}{name}.weight"][0] for name in names]
            for kind, stacked in (("weight", present[field]), ("bias", present.get(f"{field}_bias"))):
                if stacked is not None:
                    parts = stacked.split(sizes)
                    tensors |= {f"{prefix}{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
        for field, name in _norm_names(config).items():
            tensors[f"{prefix}{name}.weight"] = present[field] - config.norm_offset
    return tensors


_STACKS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def _has_bias(config: ModelConfig, name: str) -> bool:
    if name.startswith("mlp."):
        return config.mlp_bias
    return config.output_bias if name.endswith("o_proj") else config.qkv_bias


def _norm_names(config: ModelConfig) -> dict[str, str]:
    """Our norm fields and the checkpoint's names for them; Gemma 2 has norms after as well as before."""
    names = {"input_norm": "input_layernorm"}
    if config.post_norms:
        names |= {"post_attention_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
                  "post_mlp_norm": "post_feedforward_layernorm"}  # fmt: skip
    else:
        names["mlp_norm"] = "post_attention_layernorm"
    if config.qk_norm:
        names |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    return names


def _read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the named tensors, checking that each is there with the right shape."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    # A tied checkpoint may still store its head; buffers of old checkpoints are recomputed.
                    if name in shapes:
                        tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}; fetch it again") from error
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shapes)} weights, first {missing[0]}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape)
            raise CheckpointError(f"{folder}: {name} must have shape {shape} by config.json, got {got}")
        if tensors[name].dtype not in DTYPES.values():
            allowed = ", ".join(DTYPES)
            raise CheckpointError(f"{folder}: {name} must be stored as {allowed}, got {tensors[name].dtype}")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is no safetensors index: {error}") from error
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    others = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors" if others else ""
    raise CheckpointError(f"{folder} has no model.safetensors{hint}")
