"""`gka train`: train a model on text files. run_folder.py describes the files that it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from ..hf.config import GKAConfig
from ..hf.folders import end_folder, write_whole
from ..hf.model import GKAForCausalLM
from ..hf.recipe import model_fields
from ..training.data import (
    Manifest,
    TokenBlocks,
    document_token,
    load_tokenizer,
    validation_texts,
    vocabulary_size,
)
from ..training.errors import UserError
from ..training.learning_rate import Schedule
from ..training.trainer import SCHEDULE_FILE, GKATrainer, ProgressCallback, ScheduleCallback, on_one_gpu
from .commands import TrainOptions
from .evaluate import Score, score_texts, total_score
from .generate import generate
from .loading import MODEL_FOLDER, load_checkpoint
from .machine import check_compiler, describe_command, describe_machine, describe_versions
from .options import flag
from .parallel import check_parallel, parallel_trainer, per_row
from .plots import plot_loss
from .quiet import quiet
from .run_folder import PARTIAL_MODEL, open_run_together
from .together import together


def main(options: TrainOptions) -> None:
    """Run `gka train`. Raises UserError for anything the user can put right."""
    quiet()
    output = Path(options.output).expanduser()
    arguments = training_arguments(
        options,
        output,
        learning_rate=options.learning_rate,
        eval_every=options.eval_every,
        compile=options.compile,
    )
    _check_equal_options(options)
    tokenizer, config = together(lambda: _tokenizer_and_config(options))
    check_parallel(options, config, arguments.world_size)
    batch = options.batch_size * options.accumulation * (arguments.world_size // per_row(options))
    manifest = open_run_together(options, output, tokenizer, batch, arguments)
    trainer = _make_trainer(options, output, arguments, config, tokenizer, manifest, batch)
    train_to_the_end(trainer, output)
    save_model(trainer, output)
    if trainer.is_world_process_zero():
        _report(options, output, trainer, manifest, batch)
    trainer.accelerator.end_training()


def _tokenizer_and_config(options: TrainOptions) -> tuple[Any, GKAConfig]:
    _check(options)
    tokenizer = load_tokenizer(options.tokenizer)
    return tokenizer, model_config(options, tokenizer)


def model_config(options: TrainOptions, tokenizer: Any) -> GKAConfig:
    """The configuration that the options describe. Raises UserError with the message of the configuration."""
    if options.family != "gka":
        for name in ("mixer", "attention_layers", "solver", "solver_steps", "tolerance", "ridge_ratio"):
            if getattr(options, name) is not None:
                raise UserError(f"{flag(name)} needs GKA layers; --family {options.family} has none")
    try:
        fields = model_fields(dataclasses.asdict(options))
        if options.family != "gka":
            fields["layer_types"] = ["full_attention"] * options.layers
        return GKAConfig(
            vocab_size=vocabulary_size(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=document_token(tokenizer),
            **fields,
        )
    except ValueError as error:
        raise UserError(f"the model options do not fit: {error}") from None


def new_model(options: TrainOptions, config: GKAConfig) -> PreTrainedModel:
    """The model with its initial weights."""
    if options.family == "gka":
        return GKAForCausalLM(config)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            tie_word_embeddings=config.tie_word_embeddings,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )


def _check(options: TrainOptions) -> None:
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite contradict each other")
    if options.save_every % options.log_every:
        raise UserError(f"--save-every {options.save_every} must be a multiple of --log-every {options.log_every}")
    try:
        options.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8 text") from None
    if options.loss_chunk is not None and options.family != "gka":
        raise UserError(f"--loss-chunk needs --family gka; --family {options.family} has the loss of transformers")
    if options.compile:
        check_compiler()


def _check_equal_options(options: TrainOptions) -> None:
    """Processes on several machines may have been started with other options."""
    first, *others = gather_object([dataclasses.asdict(options)])
    for process, found in enumerate(others, start=1):
        for name, value in first.items():
            if found[name] != value:
                raise UserError(
                    f"{flag(name)} is {value} in process 0 and {found[name]} in process {process}; "
                    "give all processes the same options"
                )


def training_arguments(
    options: Any, output: Path, *, learning_rate: float, eval_every: int, compile: bool = False
) -> TrainingArguments:
    """The Trainer's arguments; options are those of `gka train` or of another command that trains."""
    cpu = options.device == "cpu" or not torch.accelerator.is_available()
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1  # set by torchrun and accelerate
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        ddp_find_unused_parameters=False,  # every parameter has a gradient in every step
        learning_rate=learning_rate,
        weight_decay=options.weight_decay,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and distributed else None,
        bf16=options.dtype == "bfloat16",
        torch_compile=compile,
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it reads the loss after every backward pass
        accelerator_config={"non_blocking": True},  # else copying a batch to a GPU waits for the GPU
        eval_strategy="steps",
        eval_steps=eval_every,
        save_steps=options.save_every,
        save_total_limit=2,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=[],
    )
    return on_one_gpu(arguments)


# Training


def _make_trainer(
    options: TrainOptions,
    output: Path,
    arguments: TrainingArguments,
    config: GKAConfig,
    tokenizer: Any,
    manifest: Manifest,
    batch: int,
) -> GKATrainer:
    train = TokenBlocks(output / "data" / "train.bin", manifest.dtype, options.seq_len, multiple=batch)
    eval_len = min(options.seq_len, manifest.validation.tokens)
    eval_blocks = math.ceil(options.eval_bytes * manifest.tokens_per_byte / eval_len)
    validation = TokenBlocks(output / "data" / "validation.bin", manifest.dtype, eval_len, max_blocks=eval_blocks)

    max_steps = options.max_steps
    max_seconds = options.max_minutes * 60 if options.max_minutes else None
    if max_steps is None and max_seconds is None:
        max_steps = len(train) // batch
    arguments.max_steps = max_steps if max_steps is not None else sys.maxsize // batch
    schedule, step = schedule_of(output, arguments, max_steps, max_seconds, options.warmup, per_row(options))
    writer = together(lambda: _tensorboard(output, step) if arguments.process_index == 0 else None)

    set_seed(options.seed)
    model = new_model(options, config)
    if isinstance(model, GKAForCausalLM):
        model.set_loss_chunk(options.loss_chunk)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer_of = parallel_trainer(options, config, eval_len)
    trainer: GKATrainer = trainer_of(
        schedule=schedule,
        tokens_per_byte=manifest.tokens_per_byte,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=default_data_collator,  # all blocks have the same length; padding would need a pad token
        callbacks=[ScheduleCallback(schedule), ProgressCallback(schedule, batch * options.seq_len)],
    )
    trainer.remove_callback(PrinterCallback)
    if writer is not None:
        trainer.add_callback(TensorBoardCallback(writer))
        _announce(options, trainer, model, manifest, step)
    return trainer


def _tensorboard(output: Path, step: int) -> SummaryWriter:
    return SummaryWriter(str(output / "tensorboard"), purge_step=step or None)


def schedule_of(
    output: Path,
    arguments: TrainingArguments,
    max_steps: int | None,
    max_seconds: float | None,
    warmup: float,
    processes_per_row: int = 1,
) -> tuple[Schedule, int]:
    """The schedule of the training in a folder, and the step of its newest checkpoint."""
    sequences = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    seconds, step = _spent(get_last_checkpoint(str(output)), sequences // processes_per_row)
    return Schedule(max_steps, max_seconds, warmup, seconds_before=seconds, agree=_agree(arguments)), step


def _agree(arguments: TrainingArguments) -> Any:
    if arguments.world_size == 1:
        return lambda progress: progress
    return lambda progress: broadcast_object_list([progress])[0]


def _spent(checkpoint: str | None, sequences: int) -> tuple[float, int]:
    """Seconds and steps of training before a checkpoint. UserError if its steps have other batches."""
    if checkpoint is None:
        return 0.0, 0
    schedule = json.loads(Path(checkpoint, SCHEDULE_FILE).read_text(encoding="utf-8"))
    if schedule.get("sequences", sequences) != sequences:
        raise UserError(
            f"--resume: a step of {checkpoint} has {schedule['sequences']} sequences, now {sequences}; with "
            "another number of processes change --batch-size or --accumulation too"
        )
    step = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).global_step
    return schedule["seconds"], step


def train_to_the_end(trainer: GKATrainer, output: Path) -> None:
    """Train to the end of the schedule, from the newest checkpoint if there is one."""
    checkpoint = get_last_checkpoint(str(output))
    schedule = trainer.schedule
    if checkpoint is not None:
        step = _spent(checkpoint, trainer.get_total_train_batch_size(trainer.args))[1]
        by_steps = schedule.max_steps is not None and step >= schedule.max_steps
        if by_steps or (schedule.max_seconds is not None and schedule.seconds >= schedule.max_seconds):
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
            if trainer.is_world_process_zero():
                print("training is complete already; its report follows", file=sys.stderr)
            return
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.close()


def _large_share(share: float, fraction: float) -> str:
    """What to say if much more of the text is held out than asked for, since whole files are."""
    if share <= 2 * fraction + 0.05:
        return ""
    return (
        f", {share:.0%} of the text for --validation-fraction {fraction}, since whole files are held out: "
        "use more files, or one alone"
    )


def _announce(
    options: TrainOptions, trainer: GKATrainer, model: PreTrainedModel, manifest: Manifest, step: int
) -> None:
    train, held_out = manifest.train, manifest.validation
    resumed = ", no checkpoint yet: starts at step 0" if options.resume else ""
    if step:
        resumed = f", resumed at step {step}"
    lines = [
        f"data      {train.files} files, {train.bytes / 1e6:.1f} MB; "
        f"held out: {held_out.files} files, {held_out.bytes / 1e6:.2f} MB"
        + _large_share(held_out.bytes / max(1, train.bytes + held_out.bytes), options.validation_fraction),
        f"model     {getattr(model.config, 'mixer', options.family)}, "
        f"{options.layers} layers of {options.hidden_size}, "
        f"{model.num_parameters() / 1e6:.1f} M parameters, "
        f"tokenizer: {'bytes' if options.tokenizer is None else options.tokenizer}",
        f"run       {options.output}, {trainer.args.device}, {trainer.args.world_size} process(es) of "
        f"{torch.get_num_threads()} threads"
        + (f", {per_row(options)} for each sequence" if per_row(options) > 1 else "")
        + (", FSDP" if options.fsdp else "")
        + resumed,
    ]
    if manifest.skipped:
        lines.insert(1, f"          left out: {manifest.skipped}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def save_model(trainer: GKATrainer, output: Path) -> None:
    """Write the model and its tokenizer to a temporary folder, then rename that folder to `model/`."""
    partial, final = output / PARTIAL_MODEL, output / MODEL_FOLDER
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that only this run can use
        end_folder(partial, final)
        trainer.save_state()


# The end of a run


def _report(options: TrainOptions, output: Path, trainer: GKATrainer, manifest: Manifest, batch: int) -> None:
    """Evaluate the saved model, draw the loss curve, write metrics.json, and print a summary."""
    model, tokenizer = load_checkpoint(str(output / MODEL_FOLDER), options.device, families=(options.family,))
    texts = validation_texts(output / "data", options.eval_bytes)
    scores = score_texts(
        model,
        tokenizer,
        texts,
        window=max(options.seq_len, 512),
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    score = total_score(scores)
    history = trainer.state.log_history
    _draw(output / "loss.png", options, history, manifest, score)
    metrics = {
        "validation": {**score.as_dict(), "files": len(scores)},
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * batch * options.seq_len,
        "seconds": round(trainer.schedule.seconds, 1),
        "parameters": model.num_parameters(),
        "data": {"train": dataclasses.asdict(manifest.train), "held_out": dataclasses.asdict(manifest.validation)},
        "command": describe_command(),
        "options": dataclasses.asdict(options),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    write_whole(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(
        f"\nvalidation  {score.bits_per_byte:.3f} bits per byte, {score.loss:.3f} nats per token "
        f"({score.bytes / 1e3:,.0f} kB of {len(scores)} held-out files, each read from its start)\n"
        f"loss curve  {output / 'loss.png'}\n"
        f"checkpoint  {output / MODEL_FOLDER}"
        "    (load it with: import gka; AutoModelForCausalLM.from_pretrained)"
    )
    if options.sample_tokens and options.prompt:
        print("sample\n")
        generate(
            model,
            tokenizer,
            options.prompt,
            max_new_tokens=options.sample_tokens,
            seed=options.seed,
            file=sys.stdout,
        )
        print()


def _draw(
    path: Path, options: TrainOptions, history: list[dict[str, Any]], manifest: Manifest, score: Score
) -> None:
    to_bits = manifest.train.tokens / manifest.train.bytes / math.log(2)
    plot_loss(
        path,
        [(logs["step"], logs["loss"] * to_bits) for logs in history if "loss" in logs],
        [(logs["step"], logs["eval_bits_per_byte"]) for logs in history if "eval_bits_per_byte" in logs],
        f"{options.output}: {score.bits_per_byte:.2f} bits per byte on held-out files",
    )
