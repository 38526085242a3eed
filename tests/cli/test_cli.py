"""The command line: help, options from flags and YAML, and mistakes in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_run import SETTINGS, command, run_process, train, write_texts
from transformers import ByT5Tokenizer

from gka.cli import commands, options
from gka.cli import main as cli
from gka.cli.commands import COMMANDS, EvalOptions, ExportOptions, GenerateOptions, TrainOptions
from gka.cli.convert_options import ConvertOptions, DistillOptions, RankOptions

OPTION_CLASSES = {
    "train": TrainOptions,
    "generate": GenerateOptions,
    "eval": EvalOptions,
    "export": ExportOptions,
    "convert": ConvertOptions,
    "distill": DistillOptions,
    "rank-layers": RankOptions,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    place = tmp_path_factory.mktemp("finished")
    assert train(place / "run", write_texts(place / "texts"), max_steps=2, save_every=2) == 0
    return place / "run"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test forgets to forbid is written to its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def parse(name: str, *arguments: str) -> Any:
    chosen = COMMANDS[name]
    parser = options.build_parser(OPTION_CLASSES[name], f"gka {name}", chosen.summary, chosen.examples)
    return options.parse_options(parser, OPTION_CLASSES[name], arguments)


def one_line_error(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> str:
    """Run a command line that must fail as a mistake of the user's does; the line it prints."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == 1
    assert lines[-1] == errors[0], "nothing follows the error"
    assert "Traceback" not in captured.err
    assert errors[0].startswith(f"gka {arguments[0]}: error: " if arguments[0] in COMMANDS else "gka: error: ")
    for word in words:
        assert word in errors[0]
    return errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for name, chosen in COMMANDS.items():
        assert f"  {name}" in shown
        assert chosen.summary in shown


@pytest.mark.parametrize("name", OPTION_CLASSES)
def test_help_lists_every_option_with_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "examples:" in shown
    for field in dataclasses.fields(OPTION_CLASSES[name]):
        assert field.metadata["help"][:25] in shown
        known = field.name.upper() if field.metadata["positional"] else options.flag(field.name)
        assert known in shown


def test_parsing_and_help_need_no_torch() -> None:
    script = (
        "import sys, gka.cli.main\n"
        "try: gka.cli.main.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    run_process(script, launcher=("-c",))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gka 0.")


def test_the_module_is_the_command() -> None:
    failed = run_process("generate", "/nowhere/at/all", check=False)
    assert failed.returncode == 2
    assert failed.stderr == "gka generate: error: /nowhere/at/all: no such checkpoint folder\n"


# Values


def test_defaults_then_yaml_then_flags(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "seq-len: 64\nlearning_rate: 3e-4\nheads: 2\ncompile: true\nsolver_steps: [8, 8]\n"
    )
    parsed = parse("train", "--config", str(tmp_path / "c.yaml"), "--heads", "8", "--no-compile")
    assert (parsed.seq_len, parsed.learning_rate, parsed.solver_steps) == (64, 3e-4, [8, 8])
    assert (parsed.heads, parsed.compile) == (8, False)
    assert parsed.layers == TrainOptions().layers


def test_lists_and_numbers_on_the_command_line() -> None:
    parsed = parse(
        "train", "--data", "a", "b", "--solver-steps", "16,16", "--attention-layers", "1", "--warmup", "0"
    )
    assert (parsed.data, parsed.solver_steps, parsed.attention_layers) == (["a", "b"], [16, 16], [1])
    assert parsed.warmup == 0.0


def test_written_options_are_read_back(tmp_path: Path) -> None:
    before = TrainOptions(data=["päth"], solver_steps=[16, 16], max_minutes=1e-7, prompt="a: 'b'\n")
    (tmp_path / "o.yaml").write_text(options.as_yaml(before), encoding="utf-8")
    assert TrainOptions(**options.read_yaml(tmp_path / "o.yaml", TrainOptions)) == before


@pytest.mark.parametrize(
    ("name", "file", "more"),
    [
        ("train", "convert_teacher.yaml", []),
        ("distill", "convert_distill.yaml", ["runs/hybrid", "--teacher", "runs/teacher"]),
    ],
)
def test_the_settings_of_the_conversion_are_valid(name: str, file: str, more: list[str]) -> None:
    path = Path(__file__).parents[2] / "configs" / file
    parsed = parse(name, *more, "--config", str(path))
    assert parsed.seq_len == 256


def test_flags_may_stand_between_positionals() -> None:
    parsed = parse("convert", "model", "--layers", "1,3,5", "out", "--seed", "2")
    assert (parsed.model, parsed.out, parsed.layers, parsed.seed) == ("model", "out", [1, 3, 5], 2)


def test_the_demo_settings_are_valid() -> None:
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    parsed = parse("train", "--config", str(demo))
    assert parsed.max_minutes < 5
    assert set(yaml.safe_load(demo.read_text())) <= {field.name for field in dataclasses.fields(TrainOptions)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate: 1", ["'lerning_rate'", "did you mean learning_rate?"]),
        ("seq_len: many", ["seq_len", "expected a whole number", "'many'"]),
        ("seq_len: 1.5", ["seq_len", "expected a whole number"]),
        ("seq_len: true", ["seq_len", "expected a whole number"]),
        ("seq_len: null", ["seq_len", "expected a whole number"]),
        ("learning_rate: fast", ["learning_rate", "expected a number"]),
        ("compile: 1", ["compile", "expected true or false"]),
        ("data: one", ["data", "expected a list of texts"]),
        ("solver_steps: [1, x]", ["solver_steps", "expected a whole number", "'x'"]),
        ("mixer: mamba", ["mixer", "one of gka, gla"]),
        ("heads: 0", ["--heads", "at least 1"]),
        ("heads: 2\nseq_len: [1", ["bad YAML", "line 2"]),
        ("- a\n- b", ["must contain 'option: value' lines"]),
        ("\xff", ["not UTF-8"]),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    one_line_error(capsys, ["train", "--config", str(tmp_path / "bad.yaml")], *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (["train", "--lerning-rate", "1"], ["'--lerning-rate'", "did you mean --learning-rate?"]),
        (["train", "--max", "1"], ["unknown argument '--max'"]),
        (
            ["convert", "a", "--output", "b"],
            ["unknown argument '--output'; usage: gka convert MODEL OUT [options]"],
        ),
        (["train", "stray"], ["unknown argument 'stray'"]),
        (["train", "--max-steps", "x"], ["--max-steps", "expected a whole number, got 'x'"]),
        (["train", "--max-steps"], ["--max-steps", "expected one argument"]),
        (["train", "--solver-steps", "8,b"], ["--solver-steps", "separated by commas", "'8,b'"]),
        (["train", "--mixer", "mamba"], ["--mixer", "mamba"]),
        (["train", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["train", "--solver-steps", "1000"], ["--solver-steps", "at most 128"]),
        (["train", "--learning-rate", "0"], ["--learning-rate", "greater than 0"]),
        (["train", "--learning-rate", "nan"], ["--learning-rate", "finite"]),
        (["train", "--config", "/none.yaml"], ["/none.yaml", "no such file"]),
        (["train", "--resume", "--overwrite"], ["contradict"]),
        (["train", "--save-every", "15"], ["--save-every 15", "--log-every 10"]),
        (["train", "--attention-layers", "4", "--layers", "4"], ["attention_layers", "0 to 3"]),
        (["train", "--heads", "3", "--kv-heads", "2"], ["model options do not fit"]),
        (["train", "--tokenizer", "/none"], ["--tokenizer /none", "no such folder"]),
        (["generate"], ["CHECKPOINT is missing"]),
        (["eval"], ["CHECKPOINT is missing"]),
        (["generate", "/none"], ["/none", "no such checkpoint folder"]),
        (["eval", "/none", "--data", "x"], ["/none", "no such checkpoint folder"]),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    one_line_error(capsys, arguments, *words)


# Files and folders


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", ["no such file or folder"]),
        ("empty.txt", b"", ["contains no text"]),
        ("latin.txt", b"caf\xe9", ["not UTF-8 text"]),
        ("short.txt", b"a few words\n", ["too little text"]),
    ],
)
def test_data_that_cannot_be_used(
    tmp_path: Path, name: str | None, content: bytes, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / (name or "none.txt")
    if name:
        path.write_bytes(content)
    arguments = command("train", data=[path], output=tmp_path / "run", **SETTINGS)
    one_line_error(capsys, arguments, *words)
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_data_leaves_the_old_run_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    (tmp_path / "short.txt").write_text("a few words\n" * 30)
    for arguments in (
        command("train", data=[tmp_path / "none"], output=finished, overwrite=True),
        command("train", data=[tmp_path / "short.txt"], output=finished, overwrite=True),
        command("train", data=[tmp_path], output=finished),
        command("train", output=finished, resume=True, hidden_size=48),
        command("train", output=finished, heads=5, kv_heads=2, overwrite=True),
    ):
        one_line_error(capsys, arguments)
    assert contents(finished) == before
    assert [path.name for path in finished.parent.iterdir() if path.name.startswith("run")] == ["run"]


def test_a_run_that_cannot_start_leaves_nothing(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (texts.parent / "empty").mkdir()
    for name in ("new", "empty"):
        arguments = command("train", data=[texts], output=texts.parent / name, batch_size=1000, device="cpu")
        one_line_error(capsys, arguments, "too little text", "--batch-size")
    assert sorted(path.name for path in texts.parent.iterdir()) == ["empty", "texts"]
    assert not list((texts.parent / "empty").iterdir())


def test_overwriting_spares_what_is_no_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / commands.OPTIONS_FILE).write_text(options.as_yaml(TrainOptions()))
    (tmp_path / "run.old").mkdir()
    arguments = command("train", data=[texts], output=tmp_path / "run", overwrite=True)
    one_line_error(capsys, arguments, "run.old exists and is not a run")
    assert (tmp_path / "run" / commands.OPTIONS_FILE).is_file()
    assert (tmp_path / "run.old").is_dir()


def test_an_output_folder_that_holds_something(
    finished: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_line_error(capsys, command("train", data=[texts], output=finished), "already contains a run", "--resume")
    one_line_error(
        capsys, command("train", data=[texts], output=texts, overwrite=True), "not empty and is not a run of gka"
    )
    one_line_error(capsys, command("train", data=[texts], output=texts / "text0.txt"), "is a file")
    one_line_error(capsys, command("train", output=tmp_path / "new", resume=True), "there is no run")
    assert len(list(texts.iterdir())) == 12
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder that nobody may write to")
def test_no_permission_to_write(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line_error(
        capsys, command("train", data=[texts], output="/proc/gka-run", **SETTINGS), "/proc/gka-run", "cannot"
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission_to_read(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (texts / "text0.txt").chmod(0)
    arguments = command("train", data=[texts / "text0.txt"], output=tmp_path / "run")
    one_line_error(capsys, arguments, "text0.txt", "permission denied")


def test_resume_with_another_model_names_the_option(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command("train", output=finished, resume=True, hidden_size=48)
    one_line_error(capsys, arguments, "--hidden-size 16, not 48")


def test_resume_takes_the_options_of_the_run(finished: Path) -> None:
    parsed = parse("train", "--resume", "--output", str(finished), "--max-steps", "99")
    assert (parsed.hidden_size, parsed.seq_len, parsed.max_steps) == (16, 32, 99)
    assert parsed.resume
    assert not parsed.overwrite


# Checkpoints


def _spoil_type(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))


def _spoil_size(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))


def _truncate(model: Path) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: (model / "config.json").unlink(), ["is not a checkpoint"]),
        (lambda model: (model / "config.json").write_text("{"), ["is not a model configuration"]),
        (_spoil_type, ["type 'llama'", "needs type 'gka'", "convert it first"]),
        (_spoil_size, ["weights do not fit", "missing keys"]),
        (lambda model: (model / "model.safetensors").unlink(), ["model cannot be loaded"]),
        (_truncate, ["model cannot be loaded"]),
        (lambda model: (model / "tokenizer_config.json").unlink(), ["tokenizer cannot be loaded"]),
        (
            lambda model: ByT5Tokenizer(extra_ids=9).save_pretrained(model),
            ["tokenizer has 268 tokens, the model 259"],
        ),
    ],
)
@pytest.mark.parametrize("name", ["generate", "eval"])
def test_checkpoints_that_cannot_be_used(
    finished: Path, tmp_path: Path, texts: Path, name: str, spoil: Any, words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "copy"
    model.mkdir()
    for path in (finished / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    spoil(model)
    more = {"data": [texts]} if name == "eval" else {"max_new_tokens": 2}
    one_line_error(capsys, command(name, str(model), **more), *words)


def test_eval_without_text(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    arguments = command("eval", str(finished), data=[tmp_path / "empty.txt"])
    one_line_error(capsys, arguments, "contains no text")
    (tmp_path / "model").mkdir()
    for path in (finished / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    one_line_error(capsys, ["eval", str(tmp_path / "model")], "--data is missing")


def test_a_run_that_has_not_ended_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / commands.OPTIONS_FILE).write_text(options.as_yaml(TrainOptions()))
    one_line_error(capsys, ["generate", str(tmp_path)], "gka train --resume")


def test_resuming_without_a_checkpoint_is_said(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    given = command("train", output=run, data=[texts], **SETTINGS | {"max_steps": 1})
    (run / commands.OPTIONS_FILE).write_text(options.as_yaml(parse(*given)))
    assert cli.main(["train", "--resume", "--output", str(run)]) == 0
    assert "no checkpoint yet: starts at step 0" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(target: str) -> Any:
        if target == COMMANDS["train"].options:
            return TrainOptions
        raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")

    monkeypatch.setattr(cli, "_load", missing)
    one_line_error(capsys, ["train"], "needs tensorboard", "gated-kalmanet[train]")


@pytest.mark.parametrize("name, extra", [("serve", "serve"), ("convert", "train")])
def test_a_missing_extra_of_the_models_is_named(
    name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers.models")

    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda target: missing if target == COMMANDS[name].run else load(target))
    arguments = [str(tmp_path)] if name == "serve" else [str(tmp_path), str(tmp_path / "out"), "--layers", "1"]
    one_line_error(capsys, [name, *arguments], "needs transformers", f"gated-kalmanet[{extra}]")


def test_an_interrupted_run_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda target: load(target) if "Options" in target else interrupted)
    monkeypatch.chdir(tmp_path)

    def told(*arguments: str) -> str:
        assert cli.main([*arguments]) == 130
        return capsys.readouterr().err.strip()

    train = ("train", "--output", "runs/my run")
    assert told(*train) == "gka train: interrupted; nothing is saved yet"
    Path("runs/my run").mkdir(parents=True)
    options = Path("runs/my run/options.yaml")
    options.touch()
    how = "interrupted; `gka train --resume --output 'runs/my run'`"
    assert told(*train) == f"gka train: {how} starts at step 0: no checkpoint yet"
    for name in ("checkpoint-70", "checkpoint-140", "checkpoint-new", "checkpoint-210-old2"):
        Path("runs/my run", name).mkdir()
    assert told(*train) == f"gka train: {how} resumes from step 140"
    os.utime(options, (1e9, 1e9))  # a run of before, which this command has not opened yet
    assert told(*train) == "gka train: interrupted; nothing is saved yet"
    assert told(*train, "--resume") == f"gka train: {how} resumes from step 140"
    assert told("eval", "runs/x") == "gka eval: interrupted"


def test_an_interrupted_distillation_says_which_stage_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SimpleNamespace(output=str(tmp_path), resume=False)
    (tmp_path / "options.yaml").touch()

    def told() -> str:
        return cli._how_to_resume("gka distill", options, time.time())

    for folder, where in (("layers", "step 20 of layers/"), ("tune", "step 20 of tune/")):
        (tmp_path / folder / "checkpoint-20").mkdir(parents=True)
        assert told() == f"; `gka distill --resume --output {tmp_path}` resumes from {where}"


def test_a_mistake_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(target: str) -> Any:
        return TrainOptions if target == COMMANDS["train"].options else broken_command

    def broken_command(_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_load", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train"])
