"""A run: what it reads, its loop in accelerate, its checkpoints."""

import json
import shutil
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from mmengine.config import Config
from torch import Tensor, nn

import mmpeft
from mmpeft.checkpoint.atomic import replacing
from mmpeft.engine.recipe import check_run
from mmpeft.errors import UsageError
from mmpeft.methods.arguments import has_type

from .data import Latents, encode_images, image_files, prompts_of, read_images, subject_name
from .denoising import Denoising
from .models import Pipeline, inject, load_adapters, load_pipeline, save_adapters
from .pictures import generate


def train(cfg: Config, work_dir: str | Path, resume: bool = False) -> None:
    """Train adapters; writes them, a log and checkpoints below ``work_dir``.

    Args:
        cfg: Of ``configs/``.
        work_dir: New, or of the run that is resumed.
        resume: Go on from the last checkpoint, with the bits of a run that was not interrupted.

    Raises:
        UsageError: Models or images are missing, a number is not positive, or the folder has
            another run.
        TrainingError: See :func:`mmpeft.monitor`.
    """
    for key in ('steps', 'batch_size', 'accumulation', 'save_every'):
        if not (has_type(cfg[key], int) and cfg[key] > 0):
            raise UsageError(f'{key}={cfg[key]!r} is not a positive integer, such as 4.')
    work_dir = Path(work_dir)
    # Without cpu=True accelerate takes several processes on CPUs for so many runs of one.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=cfg.accumulation)
    prompts_of(cfg, subject_name(cfg))
    read_images(cfg.subject.images)  # missing ones are found before anything is made
    check_run(cfg, work_dir / 'config.py', resume)
    pipeline = load_pipeline(cfg).to(accelerator.device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        work_dir.mkdir(parents=True, exist_ok=True)
        cfg.dump(work_dir / 'config.py')
    prompts, images = material(cfg, work_dir, pipeline, accelerator)
    pipeline.vae.to('cpu')
    set_seed(cfg.seed)
    parts = inject(pipeline, cfg)
    model = Denoising(pipeline, parts, prompts, cfg.prior.weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, weight_decay=cfg.weight_decay)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    monitors = [mmpeft.monitor(part, optimizer, cfg.steps) for part in parts.values()]
    accelerator.register_for_checkpointing(*monitors)
    accelerator.register_save_state_pre_hook(partial(_save_parts, parts, accelerator))
    accelerator.register_load_state_pre_hook(partial(_load_parts, parts))
    done = restore(accelerator, work_dir) if resume else 0
    for step in range(done + 1, cfg.steps + 1):
        loss = optimizer_step(accelerator, model, optimizer, trained, parts, images, step, cfg)
        record(accelerator, work_dir, dict(step=step, loss=loss))
        if step % cfg.save_every == 0 or step == cfg.steps:
            save(accelerator, work_dir, step)
    for monitor in monitors:
        monitor.close()
    if accelerator.is_main_process:
        save_adapters(parts, work_dir)
    accelerator.wait_for_everyone()


def material(
    cfg: Config, work_dir: Path, pipeline: Pipeline, accelerator: Accelerator
) -> tuple[list[str], list[Latents]]:
    """Prompts and latents: of the subject and, with prior preservation, of its class.

    Images of the class that are missing are made by the pipeline as it is.
    """
    prompts, folders = [cfg.prompt.format(subject_name(cfg))], [cfg.subject.images]
    if cfg.prior.number:
        prompts.append(cfg.prompt.format(cfg.subject.class_name))
        folders.append(Path(cfg.prior.images or work_dir / 'class'))
        with accelerator.main_process_first():
            make_class_images(cfg, pipeline, prompts[1], folders[1])
    pipeline.vae.to(torch.float32)
    return prompts, [encode_images(pipeline, read_images(f), cfg.resolution) for f in folders]


def make_class_images(cfg: Config, pipeline: Pipeline, prompt: str, folder: Path) -> None:
    """Fill a folder up to the number of images that prior preservation wants."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f'{number:04}.png' for number in count())
    free = (path for path in paths if not path.exists())
    for seed in range(len(image_files(folder)), cfg.prior.number):
        (image,) = generate(pipeline, [prompt], [seed], cfg.resolution, **cfg.sampler)
        with replacing(next(free)) as temporary:
            image.save(temporary, 'PNG')


def draw(images: list[Latents], batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moments, sizes and prompts of a batch: as many images from each source, at random."""
    rows = [torch.randint(len(source.moments), (batch_size,)) for source in images]
    pairs = [*zip(images, rows, strict=True)]
    moments = torch.cat([source.moments[row.to(source.moments.device)] for source, row in pairs])
    sizes = torch.cat([source.sizes[row.to(source.sizes.device)] for source, row in pairs])
    return moments, sizes, torch.arange(len(images)).repeat_interleave(batch_size).to(sizes.device)


def optimizer_step(accelerator, model, optimizer, trained, parts, images, step, cfg) -> float:
    """One step of the optimizer; returns the mean loss of its batches in this process.

    All random numbers of a batch follow from its number in the run, so that a resumed run draws
    those of one that was not interrupted, and two processes those of two accumulated batches.
    """
    losses = []
    for part in range(cfg.accumulation):
        number = part * accelerator.num_processes + accelerator.process_index
        key = (cfg.seed, step, number)
        set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        with accelerator.accumulate(model):
            loss = model(*draw(images, cfg.batch_size))
            losses.append(loss.item())
            terms = map(mmpeft.penalty, parts.values())
            accelerator.backward(sum((term for term in terms if term is not None), loss))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, cfg.max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return sum(losses) / len(losses)


def record(accelerator: Accelerator, work_dir: Path, values: dict) -> None:
    """Print values of a step, and append them to the log."""
    if accelerator.is_main_process:
        with (work_dir / 'log.jsonl').open('a') as file:
            file.write(json.dumps(values) + '\n')
        print('  '.join(f'{name} {value:.6g}' for name, value in values.items()), flush=True)


def save(accelerator: Accelerator, work_dir: Path, step: int) -> None:
    """Write a checkpoint that appears complete or not at all, and remove earlier ones."""
    temporary = work_dir / 'unfinished'
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        earlier = checkpoints(work_dir)
        temporary.rename(work_dir / f'step_{step}')
        for folder in earlier.values():
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def restore(accelerator: Accelerator, work_dir: Path) -> int:
    """Load the last checkpoint, if there is one; returns its step."""
    found, log = checkpoints(work_dir), work_dir / 'log.jsonl'
    step = max(found, default=0)
    if step:
        accelerator.load_state(found[step])
    if accelerator.is_main_process and log.exists():
        log.write_text(''.join(log.read_text().splitlines(keepends=True)[:step]))
    return step


def checkpoints(work_dir: Path) -> dict[int, Path]:
    """Folders of checkpoints by their step."""
    return {int(p.name.removeprefix('step_')): p for p in work_dir.glob('step_*')}


def _save_parts(parts, accelerator, models, weights, folder):
    """In place of the whole model, which accelerate would write."""
    weights.clear()
    if accelerator.is_main_process:
        save_adapters(parts, Path(folder))


def _load_parts(parts: dict[str, nn.Module], models: list, folder: str) -> None:
    models.clear()
    load_adapters(parts, Path(folder))
