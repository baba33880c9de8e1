"""Make the set of movie reviews that README.md's measurements are of.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python projects/glue/movies.py vaderSentiment-3.3.2.tar.gz data/movies

The archive holds the data of VADER (Hutto and Gilbert, ICWSM 2014; MIT): 10,605 sentences of
reviews, each with the mean rating of twenty people from -4 to 4. Here a sentence is positive above
0.5 and negative below -0.5. Others are left out, and so are those of more than 16 words. 1,000
sentences, drawn once, are the test set, and all others may train.
"""

import argparse
import csv
import hashlib
import io
import random
import tarfile
from pathlib import Path

from mmpeft.errors import UsageError

ARCHIVE = '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9'
INNER = 'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz'
RATINGS = 'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'
TEST, UNDECIDED, WORDS = 1000, 0.5, 16


def read_ratings(archive: Path) -> list[tuple[float, str]]:
    """Mean ratings and sentences of the archive.

    Raises:
        UsageError: It is not the archive, to the byte.
    """
    content = archive.read_bytes() if archive.is_file() else b''
    if hashlib.sha256(content).hexdigest() != ARCHIVE:
        raise UsageError(
            f'{str(archive)!r} is not the archive of vaderSentiment 3.3.2. Download it: pip '
            'download --no-deps --no-binary :all: vaderSentiment==3.3.2'
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        with tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
            lines = inner.extractfile(RATINGS).read().decode('utf-8', 'replace').splitlines()
    rows = (line.split('\t') for line in lines)
    return [(float(rating), text) for _, rating, text in rows]


def write_sets(ratings: list[tuple[float, str]], folder: Path) -> dict[str, int]:
    """Write ``train.csv`` and ``test.csv``, and return the rows of each."""
    kept = {
        text: int(rating > 0)
        for rating, text in ratings
        if abs(rating) > UNDECIDED and len(text.split()) <= WORDS
    }
    rows = sorted(kept.items())
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    parts = dict(test=rows[:TEST], train=rows[TEST:])
    for name, part in parts.items():
        with (folder / f'{name}.csv').open('w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([('text', 'label'), *part])
    return {name: len(part) for name, part in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('archive', type=Path)
    parser.add_argument('folder', type=Path)
    args = parser.parse_args(arguments)
    try:
        print(write_sets(read_ratings(args.archive), args.folder))
    except UsageError as error:
        raise SystemExit(str(error)) from None


if __name__ == '__main__':
    main()
