"""`gka export`: write a checkpoint in another format, `hybrid_qwen3` or `gka`, with bit-identical weights."""

from __future__ import annotations

from pathlib import Path

from ..hf.checkpoint import read_headers, restore_dtypes, write_published
from ..hf.folders import begin_folder, end_folder
from ..hf.published_writer import write_config
from ..training.errors import UserError
from .commands import ExportOptions
from .loading import copy_tokenizer, find_checkpoint, load_model
from .quiet import quiet


def main(options: ExportOptions) -> None:
    """Run `gka export`. Raises UserError if the checkpoint cannot be read, or cannot be written in the format."""
    quiet()
    source = find_checkpoint(options.checkpoint)
    model = load_model(options.checkpoint, "cpu", "auto")
    restore_dtypes(model, read_headers(source))
    output, shard_bytes = Path(options.output).expanduser(), max(1, int(options.shard_mb * 1e6))
    try:
        published = None
        if options.format == "hybrid_qwen3":
            published = write_config(model.config, options.num_iter)
        elif options.num_iter is not None:
            raise UserError(
                "--num-iter has no effect with --format gka, whose config.json has the solver steps; leave it out"
            )
        partial = begin_folder(output)
        if published is not None:
            write_published(model, partial, published, shard_bytes)
        else:
            model.save_pretrained(partial, max_shard_size=shard_bytes)
        copy_tokenizer(source, partial)
        end_folder(partial, output)
    except (ValueError, FileExistsError) as error:
        raise UserError(str(error).replace("(num_iter)", "(--num-iter)")) from None
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters, {options.format}")
