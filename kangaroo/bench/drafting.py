"""What a result says of how a drafter drafted."""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from kangaroo.drafters.settings import AutoSettings, Settings
from kangaroo.llm import resolve_settings
from kangaroo.model.checkpoint import LoadedModel

# Of a file so much is read: what tells trainings and datastores apart stands at its beginning.
DIGEST_BYTES = 1 << 20


def describe_drafter(model: LoadedModel, settings: Settings, *, batch_size: int = 1) -> dict[str, object]:
    """The settings that build_drafter drafts by, in full, those of auto's sources in their place.

    Files and folders are told by their last part and a digest of what they hold.
    """
    settings = resolve_settings(model, settings, batch_size=batch_size)
    described: dict[str, object] = asdict(settings)  # type: ignore[call-overload]
    if isinstance(settings, AutoSettings):
        described["sources"] = {
            name: describe_drafter(model, settings.settings_of(name), batch_size=batch_size)
            for name in settings.sources
        }
    for name, value in described.items():
        if isinstance(value, str) and (path := Path(value).expanduser()).exists():
            described[name] = f"{path.resolve().name} ({digest_files(path)})"
    return described


def digest_files(path: Path) -> str:
    """Short hash of a file, or of a folder's own files by name: of their sizes, and of DIGEST_BYTES of each."""
    digest = sha256()
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        if one.is_file():
            digest.update(f"{one.name if one != path else ''} {one.stat().st_size}\n".encode())
            with one.open("rb") as file:
                digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()[:8]
