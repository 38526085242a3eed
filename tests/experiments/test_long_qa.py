"""Facts of real text stand in one passage, and the prompts that ask for them are what they claim to be.

Covers experiments/tasks/passages.py, facts.py, collection.py and long_qa.py.
"""

from __future__ import annotations

import random
import re
import shutil
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks.collection import Collection
from experiments.tasks.examples import Example, exact_match, f1
from experiments.tasks.facts import KINDS, Fact, parts_of
from experiments.tasks.long_qa import ANSWER_TOKENS, NEAR_EVERY, SAME_ANSWER, Near, in_turn, make_long_qa
from experiments.tasks.passages import Document, cut
from gka.training.errors import UserError

FILES = """
    argparse.py ast.py base64.py bdb.py bz2.py calendar.py cmd.py codecs.py configparser.py csv.py doctest.py
    enum.py fractions.py ftplib.py gzip.py imaplib.py inspect.py lzma.py mailbox.py optparse.py pdb.py plistlib.py
    poplib.py pprint.py random.py shelve.py shutil.py smtplib.py socketserver.py ssl.py stat.py statistics.py
    string.py subprocess.py tempfile.py textwrap.py timeit.py token.py trace.py uuid.py weakref.py zipapp.py
    email/header.py email/policy.py http/client.py http/server.py logging/handlers.py json/encoder.py
""".split()


def in_bytes(text: str) -> int:
    return len(text.encode())


def in_words(text: str) -> int:
    """As a tokenizer of words does: pieces of words, spaces, signs; joined texts have fewer than their sum."""
    return len(re.findall(r"\w{1,6}|\s+|[^\w\s]{1,2}", text))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Some modules of the standard library, half of them for testing."""
    folder = tmp_path_factory.mktemp("library")
    for name in FILES:
        source = Path(sysconfig.get_paths()["stdlib"], name)
        if source.exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    return Collection.read([str(folder)], test_fraction=0.5)


def read(folder: Path, files: dict[str, str], **options: int) -> Collection:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return Collection.read([str(folder)], **options)


def told(collection: Collection, kind: str = "") -> set[tuple[str, str]]:
    """Subjects and answers, without the facts of kind "file" unless they are asked for."""
    return {(f.subject, f.answer) for f in collection.facts if (f.kind == kind if kind else f.kind != "file")}


# What is extracted


def test_every_kind_of_fact_is_read_from_a_source(tmp_path: Path) -> None:
    source = '''"""é: columns of syntax trees are bytes."""
LIMIT = 4_096
NAME: str = "grüße"; PAIR = (1, "x")

class Reader(io.Base):
    ratio = 0.5
    def __init__(self, path, /, mode="r", *, size=-1, strict=True): pass
    def kind(self):
        """Words."""
        for x in (lambda: 3,): pass
        return "reader"

def ünder(text: str, width: int = 70) -> list[str]: return []
@decorated(3)
async def fetch(depth=0x10): pass
'''
    collection = read(tmp_path, {"a/b.py": source})
    assert told(collection) == {
        ("a/b.py: LIMIT", "4_096"),
        ("a/b.py: NAME", '"grüße"'),
        ("a/b.py: PAIR", '(1, "x")'),
        ("a/b.py: Reader", "io.Base"),
        ("a/b.py: Reader.__init__(mode)", '"r"'),
        ("a/b.py: Reader.__init__(size)", "-1"),
        ("a/b.py: Reader.kind", '"reader"'),
        ("a/b.py: ünder(width)", "70"),
        ("a/b.py: ünder", "list[str]"),
        ("a/b.py: fetch(depth)", "0x10"),
    }
    assert told(collection, "file") == {(f"file of {name}", "a/b.py") for name in ("Reader", "ünder", "fetch")}
    assert {f.kind for f in collection.facts} == set(KINDS)
    for fact in collection.facts:
        passage = collection.passages[fact.passage]
        assert passage.text[fact.start : fact.end] == fact.answer
        assert passage.text.startswith(f"# File: {passage.file}\n") and fact.question.endswith("?")
        assert ("Which file" if fact.kind == "file" else "a/b.py") in fact.question


def test_no_more_is_read_of_a_part_than_needed(tmp_path: Path) -> None:
    """The first files of each part are taken, and the split stays."""
    files = {f"{n}.py": f"def named{n}(size={n} + 100): pass\nLIMIT{n} = {n}77\n" for n in range(20)}
    whole = read(tmp_path, files)
    some = read(tmp_path, files, part_bytes=60)
    assert some.test_files == whole.test_files
    for split in ("train", "test"):
        taken, all_of_it = some.part(split).passages, whole.part(split).passages
        assert len(taken) == 2 and taken == all_of_it[:2] and len(all_of_it) > 2
    with pytest.raises(UserError, match="part_bytes must be at least 1, got 0"):
        read(tmp_path, files, part_bytes=0)


@pytest.mark.parametrize(
    "source",
    [
        "def f(x=len('ab'), y=A, z=1 + n): pass",  # computed
        "def f(x=None, y=True, z=False) -> None: pass",  # guessed
        "def f(x='', y='...', z=(), w='a'): pass",  # nothing is left of them for the scores
        f"X = '{'a' * 60}'\nY = 'a b c d e f g h i'\nZ = [1,\n 2]",  # too long
        "def _f(x=1): return 2\nclass _C(B): pass\n_X = 3",  # private
        "def f(_x=1): pass",
        "class G(metaclass=M): pass",
        "class C(A, B): pass\nclass D: pass\nclass E(object): pass\nclass F(make()): pass",
        "def f(): return x\ndef g(x):\n if x: return 1\n return 2\ndef h(x):\n if x: return 1",  # not one literal
        "def f():\n yield 1\n return 2",
        "def f(x: int): return 2",  # it has annotations, but not this one
        "def f():\n def g(x=1): return 3\n class C(B): pass",  # nested
        "X = Y = 3\n(Z, W) = 1, 2\nobj.V = 3\nU += 3",  # no single name
        "def f(x=1: pass",  # no Python
    ],
)
def test_what_is_computed_guessed_long_private_or_nested_is_not_extracted(tmp_path: Path, source: str) -> None:
    assert told(read(tmp_path, {"a.py": source + "\n"})) == set()


@pytest.mark.parametrize(
    "second",
    [
        "def f(x=2): pass\nclass C(D): pass\nX = 2\n",
        "if a:\n    def f(x=2): pass\n    class C(D): pass\n    X = 2\n",
        "try:\n    from m import f, C, X\nexcept ImportError: pass\n",
        "import f, C, X.y\n",
        "f = g; C = D; X += 1\n",
        "for f, C, X in y: pass\n",
        "def g():\n    global f, C, X\n",
        "with o as f, o as C, o as X: pass\n",
        "del f, C, X\n",
        "match v:\n    case [f, *C]: pass\n    case {**X}: pass\n",
    ],
)
def test_a_name_that_its_file_binds_twice_has_no_facts(tmp_path: Path, second: str) -> None:
    first = "def f(x=1): pass\nclass C(B):\n    def m(self, z=5): pass\nX = 1\ndef other(y=7): pass\n"
    left = {("a.py: other(y)", "7")}
    assert told(read(tmp_path, {"a.py": first})) > left
    assert told(read(tmp_path, {"a.py": first + second})) == left


def test_a_method_that_its_class_binds_twice_has_no_facts(tmp_path: Path) -> None:
    source = "class C:\n    @property\n    def m(self, x=1): pass\n    @m.setter\n    def m(self, x=2): pass\n"
    assert told(read(tmp_path, {"a.py": source + "    def n(self, x=3): pass\n"})) == {("a.py: C.n(x)", "3")}


def test_two_files_that_define_the_same_name_do_not_answer_which_file_defines_it(tmp_path: Path) -> None:
    one, two = {"a.py": "def f(x=1): pass\ndef g(): pass\n"}, {"b.py": "def f(x=2): pass\n"}
    assert told(read(tmp_path / "1", one), "file") == {("file of f", "a.py"), ("file of g", "a.py")}
    both = read(tmp_path / "2", one | two)
    assert told(both, "file") == {("file of g", "a.py")}
    assert told(both) == {("a.py: f(x)", "1"), ("b.py: f(x)", "2")}  # these ask for a file's own
    for text in ("from a import g\n", "# g is in a.py\n", "class _C:\n    def g(self): pass\n"):
        assert told(read(tmp_path / f"3{text[0]}", one | {"c.py": text}), "file") == {("file of f", "a.py")}


def test_files_of_the_same_name_have_no_facts(tmp_path: Path) -> None:
    for folder, text in (("1", "def f(x=1): pass\n"), ("2", "def f(x=2): pass\ndef g(y=3): pass\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(text)
    assert not Collection.read([str(tmp_path / "1"), str(tmp_path / "2")]).facts
    assert Collection.read([str(tmp_path)]).facts  # here they are 1/a.py and 2/a.py


@pytest.mark.parametrize(
    ("name", "text", "dropped"),
    [
        ("b.md", "# f\n\nf has a default, and X a value", {"a.py: f(x)", "a.py: X"}),
        ("b.py", "import a\na.X = 5\n", {"a.py: X"}),
        ("b.py", "a.f = g\nC.m = h\ndel C.n\n", {"a.py: f(x)", "a.py: C.m(z)", "a.py: C.n"}),
        ("b.py", '"""Calls a.f(1, x=3) and C.m(z = 4)."""\n', {"a.py: f(x)", "a.py: C.m(z)"}),
        ("b.py", "f(x=3)\nm(z=4)\nX = 3\nclass C(D): pass\n", set()),  # the other file's own names
    ],
)
def test_what_another_file_gives_away_is_no_fact(tmp_path: Path, name: str, text: str, dropped: set[str]) -> None:
    source = "X = 1\ndef f(x=2): pass\nclass C(B):\n    def m(self, z=5): pass\n    def n(self): return 6\n"
    alone = {subject for subject, _ in told(read(tmp_path / "1", {"a.py": source}))}
    assert alone == {"a.py: X", "a.py: f(x)", "a.py: C", "a.py: C.m(z)", "a.py: C.n"}
    left = {subject for subject, _ in told(read(tmp_path / "2", {"a.py": source, name: text}))}
    assert {subject for subject in left if subject.startswith("a.py")} == alone - dropped


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("# f(1, x=3), see m(z: int = 4)", {"a.py: f(x)", "a.py: C.m(z)"}),
        ("    X = 4", {"a.py: X"}),
        ("# as in C(B)", {"a.py: C"}),
        ("x = X == 3; z = f(x == 3) or f.x", set()),
        ("    def f(x=4): pass", set()),  # other functions of the same name
        ("    class C(B): pass", set()),
    ],
)
def test_what_another_passage_of_the_file_gives_away_is_no_fact(
    tmp_path: Path, text: str, dropped: set[str]
) -> None:
    first = "X = 1\ndef f(x=2): pass\nclass C(B):\n    def m(self, z=5): pass\n" + "#\n" * 20
    source = first + f"def g():\n    '''{'word ' * 12}'''\n{text.replace('x = X', '    x = X')}\n    pass\n"
    alone = {"a.py: X", "a.py: f(x)", "a.py: C", "a.py: C.m(z)"}
    collection = read(tmp_path, {"a.py": source}, passage_chars=100)
    home = {fact.passage for fact in collection.facts}
    assert not any(text.strip() in collection.passages[number].text for number in home)
    assert {subject for subject, _ in told(collection)} == alone - dropped


def test_sources_are_read_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    source = f"open({str(proof)!r}, 'w')\ndef f(x=1): pass\n"
    assert told(read(tmp_path, {"a.py": source})) and not proof.exists()


# Passages


def test_passages_are_slices_that_leave_out_blank_lines_only(library: Collection, tmp_path: Path) -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "textwrap.py", "decimal.py"):
        document = Document(name, (stdlib / name).read_bytes())
        passages, place = cut(document, 1500), 0
        for passage in passages:
            assert passage.body == document.text[passage.start : passage.end] and len(passage.body) <= 1500
            assert not document.text[place : passage.start].strip()
            place = passage.end
        assert not document.text[place:].strip()
    assert all(len(passage.body) <= 2000 for passage in library.passages)


@given(st.lists(st.text("ab \n\r\t\f🙂é", max_size=60), max_size=20), st.sampled_from(["a.md", "a.py"]))
@settings(max_examples=100, deadline=None)
def test_any_text_is_cut_into_slices(lines: list[str], name: str) -> None:
    document = Document(name, b"\xef\xbb\xbf" + "\n\n".join(lines).encode())
    passages = cut(document, 100)
    assert [passage.body for passage in passages] == [document.text[p.start : p.end] for p in passages]
    assert "".join("".join(passage.body.split()) for passage in passages) == "".join(document.text.split())
    assert all(0 < len(passage.body) <= 100 for passage in passages)


def test_a_passage_begins_with_a_definition_or_its_header_says_what_it_is_inside() -> None:
    method = "    def m{}(self):\n        '''" + "w " * 60 + "'''\n\n"
    source = "import a\n\n\n# about f\n@deco\ndef f():\n" + "    x = 1\n" * 17 + "\n\nclass C:\n"
    source += "".join(method.format(number) for number in range(4)) + "\n\ndef g(): pass\n"
    texts = [passage.text.split("\n")[:2] for passage in cut(Document("a.py", source.encode()), 200)]
    assert texts == [
        ["# File: a.py", "import a"],
        ["# File: a.py", "# about f"],
        ["# File: a.py", "class C:"],
        *[["# File: a.py, inside C", f"    def m{number}(self):"] for number in (1, 2, 3)],
    ]


# Real files


def test_real_facts_stand_where_they_say_and_in_no_other_passage(library: Collection) -> None:
    assert {fact.kind for fact in library.facts} == set(KINDS) and len(library.facts) > 300
    assert len({fact.subject for fact in library.facts}) == len({fact.question for fact in library.facts})
    assert Counter((fact.kind, fact.subject) for fact in library.facts).most_common(1)[0][1] == 1
    of_file: dict[str, list[int]] = {}
    for number, passage in enumerate(library.passages):
        of_file.setdefault(passage.file, []).append(number)
    for fact in library.facts:
        assert library.passages[fact.passage].text[fact.start : fact.end] == fact.answer
        assert exact_match(fact.answer, [fact.answer]) == f1(fact.answer, [fact.answer]) == 1
        assert not exact_match("", [fact.answer]) and not f1("", [fact.answer])
        assert len(fact.answer.split()) <= 8 and in_bytes(f" {fact.answer}\n") <= ANSWER_TOKENS
        home = library.passages[fact.passage].file
        numbers = range(len(library.passages)) if fact.kind == "file" else of_file[home]
        tellers = [number for number in numbers if tells(fact.question, library.passages[number].text)]
        assert tellers == [fact.passage], fact


def test_train_and_test_share_nothing(library: Collection) -> None:
    assert library.shared() == {"files": set(), "bodies": set(), "subjects": set(), "questions": set()}
    parts = [library.part("train"), library.part("test")]
    assert all(len(part.facts) > 100 and len(part.passages) > 100 for part in parts)
    assert sum(len(part.facts) for part in parts) == len(library.facts)
    assert sum(len(part.passages) for part in parts) == len(library.passages)
    for part in parts:
        for fact in part.facts:
            assert part.passages[fact.passage].text[fact.start : fact.end] == fact.answer
    files = [{passage.file for passage in part.passages} for part in parts]
    found: list[set[str]] = [set(), set()]
    for split, own, seen in zip(("train", "test"), files, found, strict=True):
        for task in ("long_qa", "rag"):
            for example in make(library, task, split=split, length=20_000, count=20):
                assert {file for file, _ in passages_of(example)} <= own
                seen |= {question_of(example), *(text for _, text in passages_of(example))}
    assert not files[0] & files[1] and not found[0] & found[1]


def test_shared_finds_what_is_shared(library: Collection) -> None:
    moved = next(f for f in library.facts if (library.passages[f.passage].file in library.test_files))
    other = next(n for n, p in enumerate(library.passages) if p.file not in library.test_files)
    twice = library._replace(facts=(*library.facts, moved._replace(passage=other)))
    assert twice.shared()["subjects"] == {moved.subject} and twice.shared()["questions"] == {moved.question}


def test_copies_of_a_file_are_kept_once_so_that_no_body_is_in_both_parts(tmp_path: Path) -> None:
    files = {f"{name}.py": "def f(x=1): pass\n" for name in "abcdefgh"}
    collection = read(tmp_path, files | {"z.py": "def g(x=1): pass\n"})
    assert sorted(p.body for p in collection.passages) == ["def f(x=1): pass", "def g(x=1): pass"]
    assert not any(collection.shared().values())


# Examples


def make(collection: Collection, task: str, **options: object) -> list[Example]:
    defaults = dict(length=8192, count=10, seed=0, split="test", num_tokens=in_bytes)
    return make_long_qa(collection, task=task, **(defaults | options))  # type: ignore[arg-type]


def passages_of(example: Example) -> list[tuple[str, str]]:
    """File and text of each passage of a prompt, found by the headers alone."""
    text = example.prompt[: example.prompt.rindex("\n\nQuestion: ")]
    starts = [match.start() for match in re.finditer(r"^(?:\[\d+\] )?# File: ", text, re.MULTILINE)]
    texts = [text[a:b].rstrip("\n") for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [(re.match(r"(?:\[\d+\] )?# File: ([^\s,]+)", text)[1], text) for text in texts]  # type: ignore[index]


def question_of(example: Example) -> str:
    return re.search(r"\n\nQuestion: (.+\?)\nAnswer:\Z", example.prompt)[1]  # type: ignore[index]


def tells(question: str, text: str) -> bool:
    """Whether a passage, given as text, defines what a question asks about; by its own reading of both."""
    header, _, body = text.partition("\n")
    file, inside = re.fullmatch(r"(?:\[\d+\] )?# File: ([^\s,]+)(?:, inside (\S+))?", header).groups()  # type: ignore[union-attr]
    if asked := re.fullmatch(r"Which file defines the (?:class|function) (\w+)\?", question):
        return asked[1] in re.findall(r"\w+", text) if asked[1] in text else False
    asked = re.match(r"In ([^\s,]+), ", question)
    assert asked
    if asked[1] != file:
        return False
    if name := re.search(r"value of the constant (\w+)\?", question):
        return re.search(rf"^{name[1]}\b *(:.*)?=", body, re.MULTILINE) is not None
    if name := re.search(r"does the class (\w+) inherit", question):
        return re.search(rf"^class {name[1]}\b", body, re.MULTILINE) is not None
    name = re.search(r"the (?:method|function) ([\w.]+)", question)
    assert name
    owner, _, function = name[1].rpartition(".")
    indent = "    " if owner else ""
    for match in re.finditer(rf"^{indent}(?:async )?def {function}\(", body, re.MULTILINE):
        classes = re.findall(r"^class (\w+)", body[: match.start()], re.MULTILINE)
        at_top = re.findall(r"^(?:def|async def) (\w+)", body[: match.start()], re.MULTILINE)
        if not owner or (classes or ([] if at_top else [(inside or "").split(".")[0]]))[-1:] == [owner]:
            return True
    return False


@pytest.mark.parametrize("task", ["long_qa", "rag"])
def test_the_answer_stands_at_its_depth_in_the_only_passage_that_tells_it(library: Collection, task: str) -> None:
    kinds = set()
    for example in make(library, task, length=30_000, count=60):
        (answer,), (depth,) = example.answers, example.depths
        place = round(depth * len(example.prompt))
        assert example.prompt[place : place + len(answer)] == answer
        question, passages = question_of(example), passages_of(example)
        tellers = [text for _, text in passages if tells(question, text)]
        assert len(tellers) == 1 and len(passages) > 5
        start = example.prompt.index(tellers[0])
        assert start < place < start + len(tellers[0])
        assert len(passages) == len({text.partition("] ")[2] or text for _, text in passages})
        kinds.add(question.split()[0] + question.split()[3])
    assert len(kinds) >= 3


def test_a_document_is_consecutive_passages_in_the_order_of_the_files(library: Collection) -> None:
    ordered = [passage.text for passage in library.part("test").passages]
    for example in make(library, "long_qa", length=40_000):
        texts = [text for _, text in passages_of(example)]
        whole = [ordered.index(text) for text in texts[1:-1]]
        assert whole == [(whole[0] + step) % len(ordered) for step in range(len(whole))] and len(whole) > 10
        before, after = ordered[whole[0] - 1], ordered[(whole[-1] + 1) % len(ordered)]
        assert texts[0].split("\n")[0] == before.split("\n")[0] and before.endswith(texts[0].partition("\n")[2])
        assert after.startswith(texts[-1])


def test_numbered_passages_are_whole_but_for_one_and_share_words_with_the_question(library: Collection) -> None:
    part = library.part("test")
    near, facts = Near(part), {fact.question: fact for fact in part.facts}
    texts = {passage.text: number for number, passage in enumerate(part.passages)}
    for example in make(library, "rag", length=30_000, count=30):
        labels = [text.partition("] ") for _, text in passages_of(example)]
        assert [label for label, _, _ in labels] == [f"[{number}" for number in range(1, len(labels) + 1)]
        shown = [texts[text] for _, _, text in labels if text in texts]
        assert len(labels) - len(shown) <= 1
        fact = facts[question_of(example)]
        close = set(near.passages(fact))
        distractors = len(shown) - 1
        assert len(close & set(shown)) >= min(len(close), distractors // NEAR_EVERY) >= 1
        for number in close & set(shown):
            assert shares_a_word(part.passages[number].text, fact)
        assert fact.passage not in close


def shares_a_word(text: str, fact: Fact) -> bool:
    """Whether a passage has a definition, of the kind that is asked for, with a word of the question."""
    patterns = {
        "default": r"\b(\w+)\s*(?::[^,=()]*)?=",
        "returns": r"\bdef (\w+)",
        "base": r"\bclass (\w+) ?\(",
        "constant": r"^(\w+)\b *(?::.*)?=",
        "file": r"^(?:async def|def|class) (\w+)",
    }
    names = re.findall(patterns[fact.kind], text, re.MULTILINE)
    own = {fact.words[0]} if fact.kind == "default" else set(fact.words)
    return any(own & ({name} if fact.kind == "default" else set(parts_of(name))) for name in names)


def test_parts_of_names() -> None:
    assert parts_of("HTTPServer_of2JSONFiles") == ("files", "http", "json", "server")


def test_near_passages_are_those_that_share_a_word_in_a_definition_of_the_same_kind(tmp_path: Path) -> None:
    files = {
        "asked.py": "LOG_LEVEL = 7\ndef read_log(size=3): return 4\nclass LogFile(Base): pass\n",
        "default.py": "def other(a, size: int = None): pass\n",
        "function.py": "class A:\n    def readBytes(self): pass\n",
        "class.py": "class FileError(Exception): pass\n",
        "constant.py": "MAX_LEVEL = f()\n",
        "call.py": "x = print(read, file, level, size)\nif size == 3: pass\n",
    }
    collection = read(tmp_path, files, test_fraction=1e-9)
    part = collection.part("train")._replace(passages=collection.passages)
    near, found = Near(part), {}
    for fact in collection.facts:
        if collection.passages[fact.passage].file == "asked.py" and fact.kind != "file":
            found[fact.kind] = {collection.passages[number].file for number in near.passages(fact)}
    assert found == {
        "default": {"default.py"},
        "returns": {"function.py"},
        "base": {"class.py"},
        "constant": {"constant.py"},
    }


def test_no_passage_comes_twice_however_much_of_the_part_is_wanted(tmp_path: Path) -> None:
    files = {
        f"m{n}.py": f"def f{n}(size={n + 10}): pass\n" + "".join(f"# {n} {k}\n" for k in range(60))
        for n in range(12)
    }
    collection = read(tmp_path, files, test_fraction=0.5)
    total = sum(in_bytes(passage.text) for passage in collection.part("test").passages)
    made = 0
    for task in ("long_qa", "rag"):
        for share in (0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2):
            try:
                examples = make(collection, task, length=int(share * total) + 300, count=6)
            except UserError as error:
                assert "too little" in str(error) and share > 0.95
                continue
            made += 1
            for example in examples:
                lines = re.findall(r"^# \d+ \d+$", example.prompt, re.MULTILINE)
                assert len(lines) == len(set(lines)) > 100
    assert 4 <= made < 14


@pytest.mark.parametrize("num_tokens", [in_bytes, in_words])
@pytest.mark.parametrize("task", ["long_qa", "rag"])
@pytest.mark.parametrize("length", [2048, 8192, 32_768, 131_072])
def test_prompt_and_answer_fill_the_length(library: Collection, num_tokens, task: str, length: int) -> None:
    for example in make(library, task, length=length, count=6, num_tokens=num_tokens):
        tokens = num_tokens(example.prompt) + ANSWER_TOKENS
        assert length - 0.02 * length - 100 <= tokens <= length
        assert num_tokens(f" {example.answers[0]}\n") <= ANSWER_TOKENS


def test_each_passage_is_counted_once(library: Collection) -> None:
    calls: Counter[str] = Counter()

    def counted(text: str) -> int:
        calls[text] += 1
        return in_bytes(text)

    prompts = {example.prompt for example in make(library, "rag", length=65_536, count=20, num_tokens=counted)}
    assert all(times == 1 for text, times in calls.items() if text.startswith("# File: "))
    assert sum(times for text, times in calls.items() if len(text) > 5_000) <= 10 * len(prompts)


@pytest.mark.parametrize("task", ["long_qa", "rag"])
def test_depths_are_spread_over_the_prompt(library: Collection, task: str) -> None:
    depths = [example.depths[0] for example in make(library, task, length=65_536, count=200)]
    counts = Counter(int(4 * depth) for depth in depths)
    assert all(25 <= counts[quarter] <= 80 for quarter in range(4)), counts  # 50 expected, deviation 6


@pytest.mark.parametrize("task", ["long_qa", "rag"])
def test_the_same_arguments_give_the_same_examples_and_others_do_not(library: Collection, task: str) -> None:
    first, again = make(library, task, seed=3), make(library, task, seed=3)
    assert first == again
    assert make(library, task, seed=3, count=4) == first[:4]
    assert {question_of(e) for e in first} != {question_of(e) for e in make(library, task, seed=4)}


def test_no_fact_comes_again_before_all_were_asked_and_then_in_another_prompt(tmp_path: Path) -> None:
    files = {f"m{n}.py": f"def f{n}(size={n + 10}): pass\n# {'text ' * 200}\n" for n in range(40)}
    collection = read(tmp_path, files, test_fraction=0.5)
    asked = {fact.question for fact in collection.part("test").facts}
    examples = make(collection, "long_qa", length=4000, count=2 * len(asked))
    assert (
        {question_of(e) for e in examples[: len(asked)]}
        == {question_of(e) for e in examples[len(asked) :]}
        == asked
    )
    assert len({e.prompt for e in examples}) == len(examples)


def test_kinds_and_answers_take_turns_so_that_guessing_does_not_pay(library: Collection) -> None:
    order = in_turn(library.facts, random.Random(0))
    assert {fact.kind for fact in order[: len(KINDS)]} == set(KINDS)
    assert max(Counter((fact.kind, fact.answer) for fact in order).values()) <= SAME_ANSWER
    assert len({fact.subject for fact in order}) == len(order)
    answers = [e.answers[0] for e in make(library, "long_qa", length=8192, count=100)]
    assert Counter(answers).most_common(1)[0][1] <= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10_000_000}, r"test part of the collection holds [\d,]+ characters in .* facts: too little"),
        ({"length": 300}, "length must be at least"),
        ({"length": -1}, "length must be at least"),
        ({"count": -1}, "count must not be negative"),
        ({"task": "qa"}, "task must be long_qa or rag"),
        ({"split": "dev"}, "split must be train or test"),
    ],
)
def test_what_no_example_fits_is_refused(library: Collection, options: dict, message: str) -> None:
    for task in ("long_qa", "rag"):
        with pytest.raises(UserError, match=message):
            make(library, **({"task": task} | options))


def test_collections_without_facts_or_near_passages_are_refused(tmp_path: Path) -> None:
    bare = read(tmp_path / "1", {"a.md": "text\n" * 300, "b.md": "words\n" * 300})
    with pytest.raises(UserError, match=r"holds 1,\d+ characters in 1 passages of 1 files, and 0 facts"):
        make(bare, "long_qa", length=512)
    lone = read(tmp_path / "2", {"a.py": "def f(size=2): pass\n", "b.py": "X = 5\n"}, test_fraction=0.5)
    with pytest.raises(UserError, match="near distractor"):
        make(lone, "rag", length=512)


@pytest.mark.parametrize(
    ("options", "message"), [({"passage_chars": 99}, "passage_chars"), ({"test_fraction": 1}, "test_fraction")]
)
def test_collections_that_cannot_be_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, {"a.py": "X = 1\n"}, **options)
