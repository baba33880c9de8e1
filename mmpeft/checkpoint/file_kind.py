"""Telling checkpoints and adapter files apart, so that an error can name the right file."""

from pathlib import Path


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like safetensors: the length of a JSON header, then the header."""
    start = _start(path, 9)
    return start[8:] == b'{' and int.from_bytes(start[:8], 'little') <= path.stat().st_size


def is_torch_file(path: Path) -> bool:
    """Whether a file starts like those of ``torch.save``: a zip archive or a pickle."""
    return _start(path, 4) == b'PK\3\4' or _start(path, 2) == b'\x80\2'


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


def _start(path, size):
    with open(path, 'rb') as file:
        return file.read(size)
