"""Conversations on images in LLaVA's JSON layout, as text, tokens and labels."""

import json
from pathlib import Path

import torch
import transformers
from PIL import Image

from mmpeft.errors import MissingFileError, UsageError

IMAGE = '<image>'
# Vicuna's, in which LLaVA-1.5 is tuned.
SYSTEM = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = 'human', 'gpt'


def read_conversations(path: str | Path, images: str | Path) -> list[dict]:
    """The list of a JSON file: dicts with ``conversations`` and, of an image, its path ``image``.

    A first turn that is not a question is left out, as LLaVA's code does.

    Raises:
        MissingFileError: The file is missing, or an image is.
        UsageError: A conversation is not in LLaVA's layout.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f'There is no file {str(path)!r}. llava_v1_5_mix665k.json is at '
            'https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, whose page says where '
            'its images are; --data and --images name copies, or conversations of your own.'
        )
    try:
        items = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UsageError(f'{str(path)!r} is not JSON: {error}.') from error
    if not isinstance(items, list) or not items:
        raise UsageError(f'{str(path)!r} has to hold a list of conversations, with one or more.')
    for number, item in enumerate(items):
        _check(item, f'Conversation {number} (from 0) of {str(path)!r}')
    paths = dict.fromkeys(Path(images, item['image']) for item in items if 'image' in item)
    missing = [image for image in paths if not image.is_file()]
    if missing:
        raise MissingFileError(
            f'There is no image {str(missing[0])!r} ({len(missing)} of {len(paths)} are missing). '
            f'--images names the folder in which the paths of {str(path)!r} begin.'
        )
    return items


def _check(item, name):
    turns = item.get('conversations') if isinstance(item, dict) else None
    turns = turns if isinstance(turns, list) and all(isinstance(t, dict) for t in turns) else []
    if turns and turns[0].get('from') == 'gpt':
        item['conversations'] = turns = turns[1:]
    if not turns or len(turns) % 2:
        raise UsageError(
            f"{name} has no 'conversations' that are a list of as many questions as answers."
        )
    for turn, role in zip(turns, ROLES * (len(turns) // 2), strict=True):
        if turn.get('from') != role or not isinstance(turn.get('value'), str):
            raise UsageError(
                f"{name}: the turns are dicts with the texts 'from', 'human' and 'gpt' in turns, "
                f"and 'value'; there is {str(turn)[:80]!r} where {role!r} is to speak."
            )
    marks = [turn['value'].count(IMAGE) for turn in turns]
    if sum(marks) != ('image' in item) or sum(marks) != marks[0]:
        raise UsageError(
            f'{name} has {sum(marks)} {IMAGE} in its texts. One with an image has one, in the '
            'first question, and one without has none.'
        )


def render(turns: list[dict], end: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as a text, and where its answers and their ends are, in characters.

    The mark of an image is put first, as LLaVA's code does.

    Args:
        turns: Questions and answers; the last may be a question, behind which an answer is to be.
        end: The mark at the end of an answer, a token.
    """
    text, answers = SYSTEM, []
    for turn in turns:
        if turn['from'] == 'human':
            asked = turn['value'].replace(IMAGE, '').strip()
            if IMAGE in turn['value']:
                asked = f'{IMAGE}\n{asked}'
            text += f'{"" if text.endswith(end) else " "}USER: {asked} ASSISTANT:'
            continue
        start = len(text)
        text += f' {turn["value"].strip()}{end}'
        answers.append((start, len(text)))
    return text, answers


def open_image(item: dict, images: str | Path) -> Image.Image | None:
    """The image of a conversation in RGB; None if it has none.

    Raises:
        MissingFileError: It is missing.
    """
    if 'image' not in item:
        return None
    path = Path(images, item['image'])
    if not path.is_file():
        raise MissingFileError(f'There is no image {str(path)!r}.')
    return Image.open(path).convert('RGB')


class Conversations(torch.utils.data.Dataset):
    """Tokens, labels and pixels of conversations; labels are those of the answers alone.

    Args:
        items: See :func:`read_conversations`.
        images: The folder that their paths begin in.
        processor: Of the model.
        cutoff: Tokens of a conversation at most.
    """

    def __init__(self, items: list[dict], images: str | Path, processor, cutoff: int):
        self.items, self.images = items, images
        self.processor, self.cutoff = processor, cutoff

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item, tokenizer = self.items[index], self.processor.tokenizer
        text, answers = render(item['conversations'], tokenizer.eos_token)
        encoded = self.processor(
            images=open_image(item, self.images),
            text=text,
            truncation=True,
            max_length=self.cutoff,
            return_offsets_mapping=True,
        )
        ids = encoded['input_ids'][0]
        # The processor has put one mark for each of the image's tokens in place of one mark.
        marks = ids.count(self.processor.image_token_id)
        shift = max(marks - 1, 0) * len(IMAGE)
        labels = [
            token if any(start < last - shift <= end for start, end in answers) else -100
            for token, (_, last) in zip(ids, encoded['offset_mapping'][0], strict=True)
        ]
        row = dict(input_ids=ids, attention_mask=encoded['attention_mask'][0], labels=labels)
        pixels = encoded.get('pixel_values')
        return row | ({} if pixels is None else dict(pixel_values=torch.as_tensor(pixels[0])))


class Collator:
    """A batch: texts padded, and the pixels of those conversations that have an image."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase):
        self.pad = transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)

    def __call__(self, rows):
        pixels = [row['pixel_values'] for row in rows if 'pixel_values' in row]
        batch = self.pad([{k: v for k, v in row.items() if k != 'pixel_values'} for row in rows])
        if pixels:
            batch['pixel_values'] = torch.stack(pixels)
        return batch
