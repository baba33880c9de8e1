"""Score an adapter that train.py saved, and merge it.

    python projects/glue/evaluate.py work_dirs/rte
    python projects/glue/evaluate.py work_dirs/rte --merge work_dirs/rte/merged

``--merge`` writes a plain model, which transformers reads without mmpeft, and scores that one too.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import transformers
from glue.cli import run, texts_of
from glue.models import read_model, read_tokenizer
from glue.tasks import score
from glue.trial import Encoded, make_trainer, predict

import mmpeft
from mmpeft.errors import MissingFileError, TrainingError, UsageError


def outputs_of(model, tokenizer, splits, folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Outputs and labels of each split."""
    trainer = make_trainer(model, tokenizer, folder, per_device_eval_batch_size=64)
    return {name: predict(trainer, split) for name, split in splits.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path, help='folder that train.py wrote')
    parser.add_argument('--data', help='other data with the same columns and labels')
    parser.add_argument('--model', help='where the pretrained model is now')
    parser.add_argument('--merge', type=Path, help='folder for the merged model')
    args = parser.parse_args(arguments)
    path = args.run / 'run.json'
    if not path.is_file():
        raise MissingFileError(f'There is no {str(path)!r}. Name a folder that train.py wrote.')
    if args.merge and args.merge.is_dir() and any(args.merge.iterdir()):
        raise UsageError(f'{str(args.merge)!r} has files already. Name a new folder with --merge.')
    record = json.loads(path.read_text())
    record |= {k: v for k in ('data', 'model') if (v := getattr(args, k)) is not None}
    texts = texts_of(record, record['task'])
    classes = record.get('classes')
    if classes is not None and list(texts.classes or ()) != classes:
        raise UsageError(
            f'The run was trained on the classes {", ".join(classes)}, and this data has '
            f'{", ".join(texts.classes or ("numbers",))}. Give it the same names of classes.'
        )
    tokenizer = read_tokenizer(record['model'])
    encoded = Encoded(tokenizer, texts, record['training']['max_length'])
    splits = {name: encoded(texts.splits[name]) for name in texts.task.splits}
    model = read_model(record['model'], len(texts.classes) if texts.classes else 1)
    if texts.classes:
        model.config.id2label = dict(enumerate(texts.classes))
        model.config.label2id = {name: n for n, name in enumerate(texts.classes)}
    mmpeft.load_adapter(model, args.run / 'adapter.safetensors')
    found = outputs_of(model, tokenizer, splits, args.run)
    print(json.dumps({name: score(texts.task, *pair) for name, pair in found.items()}))
    if args.merge is None:
        return
    mmpeft.save_pretrained(model, args.merge)
    tokenizer.save_pretrained(args.merge)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(args.merge)
    merged = outputs_of(plain, tokenizer, splits, args.run)
    for name, (outputs, labels) in found.items():
        gap = np.abs(merged[name][0] - outputs).max() / np.abs(outputs).max()
        print(json.dumps({f'{name} merged': score(texts.task, merged[name][0], labels)}))
        if not gap < 1e-4:
            raise TrainingError(
                f'The merged model in {str(args.merge)!r} computes other outputs on {name!r}: they '
                f'differ by {gap:.1e} of the largest one.'
            )


if __name__ == '__main__':
    run(main)
