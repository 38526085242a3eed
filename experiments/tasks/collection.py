"""A collection of real text: passages, the facts in them, and their split into train and test by file.

A file is of the test part if its name, relative to the folder that was read, hashes to less than the test
fraction (`data.split_names`); its passages and the facts in them go with it. A body that occurs again, in a
copied file or a copied function, is kept once, where it comes first. So the parts share no passage, no subject
and no question, which `shared` checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from gka.training.data import find_files, read_texts, split_names
from gka.training.errors import UserError

from .facts import Candidate, Fact, Names, candidates, facts_of
from .passages import PASSAGE_CHARS, Document, Passage, cut

Split = Literal["train", "test"]


class Part(NamedTuple):
    """One part of a collection.

    Attributes:
        split: its name.
        passages: of its files, file after file, in order.
        facts: in them; the number of a passage counts in this part.
    """

    split: Split
    passages: tuple[Passage, ...]
    facts: tuple[Fact, ...]

    def __str__(self) -> str:
        chars = sum(len(passage.text) for passage in self.passages)
        files = len({passage.file for passage in self.passages})
        return (
            f"the {self.split} part of the collection holds {chars:,} characters "
            f"in {len(self.passages):,} passages of {files:,} files, and {len(self.facts):,} facts"
        )


class Collection(NamedTuple):
    """Passages of real files and the facts that stand in exactly one of them.

    Attributes:
        passages: of all files, file after file, in order.
        facts: in the order of the passages' files.
        test_files: names of the files of the test part.
    """

    passages: tuple[Passage, ...]
    facts: tuple[Fact, ...]
    test_files: frozenset[str]

    @classmethod
    def read(
        cls,
        arguments: Sequence[str] | None,
        *,
        passage_chars: int = PASSAGE_CHARS,
        test_fraction: float = 0.2,
        part_bytes: int | None = None,
    ) -> Collection:
        """Read files, cut them and find the facts in them. No source is run.

        Args:
            arguments: files and folders, as gka.training.data.find_files takes them; None for the sources of this
                Python's standard library (12 million characters; they took 9 seconds).
            passage_chars: characters of a file that a passage holds at most, at least 100.
            test_fraction: share of the files that are for testing, between 0 and 1.
            part_bytes: bytes of the files of a part after which no more are taken, for folders that hold more than
                prompts need; None takes all files.

        Raises:
            UserError: a number is out of its range, or as find_files and read_texts of gka.training.data.
        """
        if not 0 < test_fraction < 1:
            raise UserError(f"test_fraction must be between 0 and 1, got {test_fraction}")
        if part_bytes is not None and part_bytes < 1:
            raise UserError(f"part_bytes must be at least 1, got {part_bytes}")
        sources, skipped = find_files(arguments)
        files = Counter(source.name for source in sources)
        passages: list[Passage] = []
        found: list[tuple[str, list[Candidate]]] = []
        names, python, bodies = Names(), set[str](), set[str]()
        test_files = split_names(list(files), test_fraction)
        had = Counter[bool]()
        for source, raw in read_texts(sources, skipped):
            of_test = source.name in test_files
            if part_bytes is not None and had[of_test] >= part_bytes:
                continue
            had[of_test] += len(raw)
            document = Document(source.name, raw)
            for passage in cut(document, passage_chars):
                if passage.body not in bodies:
                    bodies.add(passage.body)
                    passages.append(passage)
            if document.tree is not None:
                names.add(document)
                python.add(source.name)
                if files[source.name] == 1:  # else the header does not tell which of them is meant
                    found.append((source.name, list(candidates(document))))
        return cls(tuple(passages), tuple(facts_of(passages, found, names, python)), frozenset(test_files))

    def part(self, split: Split) -> Part:
        """The passages and facts of the train or of the test files."""
        numbers: dict[int, int] = {}  # in the collection: in the part
        for number, passage in enumerate(self.passages):
            if (passage.file in self.test_files) == (split == "test"):
                numbers[number] = len(numbers)
        facts = [fact._replace(passage=numbers[fact.passage]) for fact in self.facts if fact.passage in numbers]
        return Part(split, tuple(self.passages[number] for number in numbers), tuple(facts))

    def shared(self) -> dict[str, set[str]]:
        """What train and test have in common, by name of what it is: all sets are empty."""
        train, test = self.part("train"), self.part("test")
        return {
            "files": {p.file for p in train.passages} & {p.file for p in test.passages},
            "bodies": {p.body for p in train.passages} & {p.body for p in test.passages},
            "subjects": {f.subject for f in train.facts} & {f.subject for f in test.facts},
            "questions": {f.question for f in train.facts} & {f.question for f in test.facts},
        }
