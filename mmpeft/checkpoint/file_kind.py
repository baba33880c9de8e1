"""Telling checkpoints and adapter files apart, so that an error can name the right file."""

from pathlib import Path


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like safetensors: the length of a JSON header, then the header."""
    with open(path, 'rb') as file:
        size, first = int.from_bytes(file.read(8), 'little'), file.read(1)
    return first == b'{' and size <= path.stat().st_size


def is_torch_file(path: Path) -> bool:
    """Whether a file starts like those of ``torch.save``: a zip archive or a pickle."""
    with open(path, 'rb') as file:
        return file.read(4).startswith((b'PK\3\4', b'\x80\2'))


def checkpoint_instead(path: Path) -> str:
    """What to say where an adapter file was given and a checkpoint is needed."""
    return (
        f'{str(path)!r} is a safetensors file, not a checkpoint. Adapter files are loaded by '
        'mmpeft.load_adapter(model, path) and mmpeft.init_model(config, path).'
        + _beside(path, '.pth', 'checkpoint')
    )


def adapter_instead(path: Path) -> str:
    """What to say where a checkpoint was given and an adapter file is needed."""
    return (
        f'{str(path)!r} is a checkpoint (a file of torch.save), not an adapter file. Checkpoints '
        "are loaded by a config's load_from, tools/test.py and mmpeft.init_model(config, path)."
        + _beside(path, '.safetensors', 'adapter file')
    )


def _beside(path, suffix, kind):
    other = path.with_suffix(suffix)
    return f' The {kind} beside it is {str(other)!r}.' if other.is_file() else ''
