"""Slots of decode steps as a captured graph reads them: in one place, and -1 where there is no request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import engine_model


@pytest.fixture
def builder(tmp_path: Path) -> Any:
    """The builder of metadata, as with CUDA graphs of decode steps."""
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import MambaSpec

    from gka.vllm.metadata import GKAMetadataBuilder
    from gka.vllm.states import state_dtypes, state_shapes

    model = engine_model("pure", tmp_path)
    arguments = EngineArgs(
        str(tmp_path), skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=6
    )
    config = arguments.create_engine_config()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    shapes, dtypes = state_shapes(model.config, 1), state_dtypes(model.config, config)
    spec = MambaSpec(shapes=shapes, dtypes=dtypes, block_size=64)
    return GKAMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))


def metadata(blocks: list[int], rows: int, **changes: Any) -> Any:
    """vLLM's metadata of decode steps alone, in a graph of some rows."""
    from gka.vllm.metadata import GKAMetadata

    number = len(blocks)
    fields = dict(
        num_prefills=0, num_prefill_tokens=0, num_decodes=number, num_decode_tokens=number, num_reqs=rows,
        has_initial_states_p=None, query_start_loc_p=None, state_indices_tensor_p=None,
        state_indices_tensor_d=torch.tensor(blocks, dtype=torch.int32).unsqueeze(1), query_start_loc_d=None,
        num_accepted_tokens=None, seq_lens=torch.ones(rows, dtype=torch.int32),
    )  # fmt: skip
    return GKAMetadata(**{**fields, **changes})


def test_rows_without_a_request(builder: Any) -> None:
    first = builder._update_metadata_for_cudagraph_capture(metadata([3, 5, 2], rows=5)).requests
    assert first.decodes == 3 and first.decode_slots.tolist() == [3, 5, 2, -1, -1]
    second = builder._update_metadata_for_cudagraph_capture(metadata([4, 0], rows=5)).requests
    assert second.decode_slots.tolist() == [4, -1, -1, -1, -1]
    assert second.decode_slots.data_ptr() == first.decode_slots.data_ptr()


def test_blocks_of_another_group(builder: Any) -> None:
    """The layers of another group of the cache have the same requests in other blocks."""
    mixed = metadata(
        [3], rows=2, num_prefills=1, num_prefill_tokens=4, state_indices_tensor_p=torch.tensor([7]),
        query_start_loc_p=torch.tensor([0, 4]), has_initial_states_p=torch.tensor([True]),
    )  # fmt: skip
    before = builder._update_metadata_for_cudagraph_capture(mixed)
    blocks = torch.tensor([[9], [0]], dtype=torch.int32)
    after = builder.update_block_table(before, blocks, torch.empty(0)).requests
    assert before.requests.prefill_slots.tolist() == [7]
    assert after.decode_slots.tolist() == [9] and after.prefill_slots.tolist() == [-1]
    assert after.prefill_tokens == 4 and after.cu_seqlens.tolist() == [0, 4]
