"""Saves that are killed at every point where they touch a file: what was there before stays whole and loads.

`python -m benchmarks.bench_reliability` counts the same for docs/reliability.md.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_everywhere import killed_everywhere
from model_helpers import tiny_config, tiny_model
from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gka import GKAForCausalLM, export_published
from gka.cli.main import main
from gka.hf.folders import begin_folder, end_folder, replaced
from gka.training.learning_rate import Schedule
from gka.training.trainer import GKATrainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
SHARD = "20KB"


def tiny(seed: int, **changes: Any) -> GKAForCausalLM:
    return tiny_model("gka without groups", torch.float32, seed, **changes)


def same(model: Any, other: Any) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state_of(folder: Path, old: Any, new: Any) -> str:
    """What a folder holds: "old", "new", "error" where it does not load, "nothing", or "mixed"."""
    if not folder.exists():
        return "nothing"
    try:
        model = GKAForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        assert str(error), "an error says something"
        return "error"
    except Exception as error:  # safetensors' own
        assert type(error).__name__ == "SafetensorError", error
        return "error"
    for name, known in (("old", old), ("new", new)):
        if known is not None and same(model, known) and model.config.solver_steps == known.config.solver_steps:
            return name
    return "mixed"


# transformers' own save, over a checkpoint


def plain_save(place: Path, sharded: bool) -> Counter[str]:
    """save_pretrained into a folder that holds a checkpoint: outcomes of all points, the last whole."""
    old, new, shards = (
        tiny(0, solver_steps=[8]),
        tiny(1, solver_steps=[9]),
        {"max_shard_size": SHARD} if sharded else {},
    )
    outcomes = [
        state_of(folder / "model", old, new)
        for folder in killed_everywhere(
            place,
            lambda folder: old.save_pretrained(folder / "model", **shards),
            lambda folder: new.save_pretrained(folder / "model", **shards),
        )
    ]
    assert outcomes[-1] == "new"
    return Counter(outcomes[:-1])


@pytest.mark.parametrize("sharded", [False, True])
def test_save_pretrained_over_a_checkpoint_is_not_atomic(sharded: bool, tmp_path: Path) -> None:
    """A fact about transformers, said in docs/reliability.md; when this fails it has changed."""
    found = plain_save(tmp_path / "place", sharded)
    assert found["error"] > 0 and found["mixed"] > 0, found


# Our own


def published(place: Path) -> Counter[str]:
    """export_published: nothing, or all of it."""
    new = tiny(1, solver_steps=[8])
    outcomes = [
        state_of(folder / "out", None, new)
        for folder in killed_everywhere(
            place, lambda folder: None, lambda folder: export_published(new, folder / "out", shard_bytes=20_000)
        )
    ]
    assert outcomes[-1] == "new"
    return Counter(outcomes[:-1])


def exported(place: Path, form: str) -> Counter[str]:
    """gka export: nothing, or model and tokenizer."""
    model = tiny(1, solver_steps=[8], vocab_size=259, eos_token_id=1)
    outcomes = []

    def begin(folder: Path) -> None:
        model.save_pretrained(folder / "model")
        ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "model")

    def export(folder: Path) -> None:
        command = ["export", str(folder / "model"), str(folder / "out"), "--format", form, "--shard-mb", "0.02"]
        assert main(command) == 0

    for folder in killed_everywhere(place, begin, export):
        outcomes.append(state_of(folder / "out", None, model))
        assert outcomes[-1] == "nothing" or (folder / "out" / "tokenizer_config.json").is_file()
        assert state_of(folder / "model", model, None) == "old"
    assert outcomes[-1] == "new"
    return Counter(outcomes[:-1])


def converted(place: Path) -> Counter[str]:
    """gka convert --overwrite: the model before, or the new one; between two renames the one before beside it."""
    source = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, pad_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip
    old, outcomes = tiny(0), []

    def begin(folder: Path) -> None:
        source.save_pretrained(folder / "source")
        old.save_pretrained(folder / "out")

    def convert(folder: Path) -> None:
        command = ["convert", str(folder / "source"), str(folder / "out"), "--layers", "1", "--overwrite"]
        assert main(command) == 0

    final = None
    for folder in killed_everywhere(place, begin, convert):
        found = state_of(folder / "out", old, None)
        if found == "nothing":
            before = replaced(folder / "out")
            assert before is not None and state_of(before, old, None) == "old"
            assert main(["eval", str(folder / "out")]) == 2, "one line says where the one before is"
            begin_folder(folder / "out", overwrite=True)
            assert state_of(folder / "out", old, None) == "old", "the next write puts it back"
            found = "old, beside"
        elif found == "mixed":  # neither the old one ...
            final = GKAForCausalLM.from_pretrained(folder / "out")  # ... so it must be all of the new one
            assert final.config.layer_types == ["full_attention", "linear_attention"]
            assert torch.equal(final.lm_head.weight, source.lm_head.weight)
            found = "new"
        outcomes.append(found)
    assert final is not None and outcomes[-1] == "new"
    return Counter(outcomes[:-1])


def test_a_link_stays_one_however_often_its_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    for name in ("first", "second", "third"):
        partial = begin_folder(link, overwrite=True)
        (partial / name).touch()
        end_folder(partial, link)
        assert link.is_symlink() and [path.name for path in link.iterdir()] == [name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("form", ["hybrid_qwen3", "gka"])
def test_gka_export_leaves_nothing_or_all(form: str, tmp_path: Path) -> None:
    assert set(exported(tmp_path / "place", form)) <= {"nothing", "new"}


def test_export_published_leaves_nothing_or_all(tmp_path: Path) -> None:
    assert set(published(tmp_path / "place")) <= {"nothing", "new"}


def test_gka_convert_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    found = converted(tmp_path / "place")
    assert set(found) <= {"old", "old, beside", "new"} and found["old, beside"] == 1


# Checkpoints of a training


def plain_trainer(folder: Path, steps: int) -> Trainer:
    torch.manual_seed(0)
    model = GKAForCausalLM(tiny_config("gka without groups", solver_steps=[4]))
    tokens = torch.randint(1, 61, (8, 8), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, save_total_limit=1, lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=[{"input_ids": x, "labels": x} for x in tokens])


def our_trainer(folder: Path, steps: int) -> GKATrainer:
    plain = plain_trainer(folder, steps)
    return GKATrainer(
        schedule=Schedule(steps, None, 0.0), tokens_per_byte=1.0, model=plain.model, args=plain.args,
        train_dataset=plain.train_dataset,
    )  # fmt: skip


def training(place: Path, make: Callable[[Path, int], Trainer]) -> Counter[str]:
    """Kills while checkpoint 2 is written and checkpoint 1 deleted: how does the newest go on, to step 3?

    "whole": as a run that nothing interrupted, bit for bit; "error": it does not load; "silent": it trains on,
    from another state, and says nothing.
    """
    trainer, whole = make(place.with_name("second"), 2), make(place.with_name("whole"), 3)
    trainer.args.save_total_limit = None
    trainer.train()
    trainer.args.save_total_limit = 1
    whole.train()
    outcomes, known = [], {}

    def begin(folder: Path) -> None:
        shutil.copytree(place.with_name("second") / "checkpoint-1", folder / "checkpoint-1")

    def save(folder: Path) -> None:
        trainer.args.output_dir = str(folder)
        trainer._save_checkpoint(trainer.model, None)

    def outcome(newest: str) -> str:
        resumed = make(place.with_name("resumed"), 3)
        resumed.args.save_strategy = "no"
        try:
            resumed.train(resume_from_checkpoint=newest)
        except Exception:
            return "error"
        return "whole" if same(resumed.model, whole.model) else "silent"

    for folder in killed_everywhere(place, begin, save):
        newest = get_last_checkpoint(str(folder))
        assert newest is not None
        content = frozenset((path.name, path.read_bytes()) for path in Path(newest).iterdir())
        if content not in known:
            known[content] = outcome(newest)
        outcomes.append(known[content])
    assert outcomes[-1] == "whole"
    return Counter(outcomes[:-1])


def test_a_checkpoint_of_our_trainer_is_whole_or_not_there(tmp_path: Path) -> None:
    found = training(tmp_path / "place", our_trainer)
    assert set(found) == {"whole"} and found["whole"] > 20


def test_a_checkpoint_of_transformers_trainer_may_be_half(tmp_path: Path) -> None:
    """A fact about transformers, said in docs/reliability.md; when this fails it has changed."""
    found = training(tmp_path / "place", plain_trainer)
    assert found["error"] + found["silent"] > 0


def figures() -> dict[str, dict[str, int]]:
    """Outcomes of every kind of save, for the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        return {
            "save_pretrained over a checkpoint, one file": plain_save(place, False),
            "save_pretrained over a checkpoint, shards": plain_save(place, True),
            "gka.export_published": published(place),
            "gka export --format hybrid_qwen3": exported(place, "hybrid_qwen3"),
            "gka export --format gka": exported(place, "gka"),
            "gka convert --overwrite": converted(place),
            "checkpoint of gka train": training(Path(folder) / "a", our_trainer),
            "checkpoint of transformers' Trainer": training(Path(folder) / "b", plain_trainer),
        }
