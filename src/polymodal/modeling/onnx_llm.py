"""A language model as a graph of ONNX Runtime: the same answers on a CPU, several times as fast.

Making a token reads every weight once, so on a CPU it is as quick as the memory is. The graph keeps weights in 32, 8 or
4 bits (blocks of 32 with a scale and a zero point each), attends with grouped queries inside a cache that is written in
place, and leaves the rest of the model as it is: embeddings, projectors and towers stay in torch.

It is made once, by the builder of onnxruntime-genai out of the merged weights, and kept in the cache folder under their
hash. onnxruntime alone runs it. Waiting threads soon sleep (`SPIN`), so that an answer beside other programs costs
what it costs alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.modeling.language_model import quieten_transformers
from polymodal.safety.config_json import read_json
from polymodal.utils.extras import extra
from polymodal.utils.files import atomic_folder, cache_folder, sha256_json, write_text
from polymodal.utils.progress import log

BITS = {"float32": 32, "int8": 8, "int4": 4}
"""Ways to keep the weights, and their bits; "float32" is what they were."""

NEEDED = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
"""What making a graph takes."""

BLOCK = 32
"""Weights of a row that share a scale and a zero point."""

WORTH = (20_000_000, 2_000_000_000)
"""Weights of a language model from which a graph pays, and up to which it is made without being asked for: making one
holds the weights three times in float32."""

GRAPH, TABLE, ABOUT, KNOWN = "model.onnx", "embeddings.safetensors", "about.json", "known.json"
REFUSED = ".refused"
KEPT = "kept_positions"
"""The graph's input that says which positions' logits it gives, counted from the end: [-1] for the last."""
PRUNING = ("/lm_head/prune/Gather", "/lm_head/prune/Unsqueeze")
"""What the builder puts before the head, so that it sees the last position alone."""
CHUNK = 512
"""Positions of a prompt that are read at once."""
SPIN = "20"
"""Microseconds that threads spin while they wait for each other. Without any a token takes a third longer on an idle
machine; with as many as the runtime chooses, half as long again beside another program."""
ROOM = 256
"""Positions by which a cache grows, at least."""


class NoGraphError(CheckpointError):
    """No graph can be made of an architecture, today or tomorrow."""


def available() -> bool:
    """Whether graphs can be made and run here."""
    return all(find_spec(name) is not None for name in NEEDED)


def require() -> None:
    """Refuse where a package is missing."""
    for name in NEEDED:
        extra(name, "fast answers on a CPU need", "polymodal[fast]")


def worth_a_graph(llm: Any) -> bool:
    """Whether a graph is made of a language model where nobody asked for one."""
    count = sum(weight.numel() for weight in llm.parameters())
    return WORTH[0] <= count <= WORTH[1] and not llm.config.is_encoder_decoder


def weights_key(llm: Any) -> str:
    """A hash of a language model's weights and settings, by which its graphs are kept."""
    passing = {"architectures", "dtype", "transformers_version", "_name_or_path"}  # which saving writes
    settings = {name: value for name, value in llm.config.to_dict().items() if name not in passing}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(llm.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def graph_folder(key: str, bits: int) -> Path:
    """Where a graph is kept; it may not be there yet."""
    made = {"weights": key, "bits": bits, "block": BLOCK, "runtime": version("onnxruntime"), "inputs": [KEPT]}
    return cache_folder() / "onnx" / f"{sha256_json(made)[:24]}-{bits}bit"


def files_key(files: Sequence[Path]) -> str:
    """What tells whether files that weights are read from are as they were: paths, sizes, times of change."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return sha256_json(stats)


def known_graph(key: str, bits: int) -> Path | None:
    """The graph that was made of these files, so that nothing of them need be read; None where there is none."""
    try:
        weights = json.loads((cache_folder() / "onnx" / KNOWN).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    folder = graph_folder(weights, bits)
    return folder if (folder / ABOUT).is_file() else None


def remember_graph(key: str, folder: Path) -> None:
    """Remember which weights files held."""
    path = cache_folder() / "onnx" / KNOWN
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    weights = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["weights"]
    write_text(path, json.dumps({**known, key: weights}, indent=1) + "\n")


def use_graph(model: Any, bits: int, tokenizer: Any) -> Path:
    """Put a graph in the place of a model's language model, whose adapter is merged; the graph's folder."""
    from polymodal.modeling.lora import fold_in  # which loads peft

    if model.encoder_decoder:
        raise CheckpointError("no graph can be made of an encoder-decoder")
    fold_in(model.llm)
    folder = make_graph(model.llm, bits, tokenizer)
    model.llm = OnnxLLM(folder).eval()
    return folder


def make_graph(llm: Any, bits: int, tokenizer: Any) -> Path:
    """Make the graph of a language model, or find the one that was made before."""
    require()
    key = weights_key(llm)
    folder = graph_folder(key, bits)
    if (folder / ABOUT).is_file():
        return folder
    if (refused := folder.with_suffix(REFUSED)).is_file():
        said = refused.read_text(encoding="utf-8").strip()
        raise CheckpointError(f"{said} (tried before; remove {refused} to retry)")
    log(f"making a graph of the language model with {bits}-bit weights, once ({folder})")
    with tempfile.TemporaryDirectory(prefix="polymodal-onnx-") as work, atomic_folder(folder, replace=True) as made:
        source, plain = Path(work) / "llm", Path(work) / "graph"
        llm.save_pretrained(source)
        tokenizer.save_pretrained(source)  # which the builder looks for
        try:
            _export(source, plain, Path(work))
            _check_graph(llm, plain)
        except NoGraphError as error:
            write_text(refused, f"{error}\n")
            raise
        _write_graph(plain / GRAPH, made / GRAPH, bits)
        _write_rest(llm, bits, key, made)
    return folder


def _write_rest(llm: Any, bits: int, key: str, folder: Path) -> None:
    """Write what stands beside a graph."""
    from safetensors.torch import save_file

    embeddings = llm.get_input_embeddings()  # which may do more than to look up, such as Gemma's
    with torch.no_grad():
        table = embeddings(torch.arange(embeddings.weight.shape[0])).float().contiguous()
    save_file({"weight": table}, folder / TABLE)
    llm.config.save_pretrained(folder)
    write_text(folder / ABOUT, json.dumps({"bits": bits, "weights": key}) + "\n")


@torch.inference_mode()
def _check_graph(llm: Any, folder: Path) -> None:
    """Make sure that a float32 graph computes what the language model does."""
    _write_rest(llm, 32, "", folder)
    graph = OnnxLLM(folder).eval()
    ids = torch.linspace(0, graph.vocab_size - 1, 12).long()[None]
    embeds, cache = graph.embed_tokens(ids), OnnxCache(graph)
    try:
        found = torch.cat([graph.read(embeds[:, :-2], cache, last=2), graph.read(embeds[:, -2:], cache, last=2)])
    except CheckpointError as error:
        raise NoGraphError(str(error)) from None
    wanted = llm(input_ids=ids).logits[0, -4:].float()
    if not bool((found - wanted).abs().max() <= 1e-3 * max(1.0, float(wanted.abs().max()))):
        raise NoGraphError(f"the graph of this {llm.config.model_type} computes something else than the model")


def _export(source: Path, target: Path, work: Path) -> None:
    """Have the builder write a float32 graph that takes embeddings and gives the logits of positions asked for."""
    import onnx

    options = ("exclude_embeds=true", "prune_lm_head=true")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(work / "cache"), "--extra_options", *options]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, errors="replace")
    if done.returncode or not (target / GRAPH).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
        kind = CheckpointError if done.returncode < 0 else NoGraphError  # killed, as where memory is short
        raise kind(f"no graph can be made of this language model ({lines[-1][:200]})")
    # What picks the last position before the head takes the positions that it is given instead.
    model = onnx.load(target / GRAPH, load_external_data=False)
    named = {node.name: node for node in model.graph.node}
    pick, widen = (named.get(name) for name in PRUNING)
    if pick is None or widen is None:
        raise NoGraphError(f"no graph can be made of this language model (it has no {' and '.join(PRUNING)})")
    pick.input[1], pick.output[0] = KEPT, widen.output[0]
    model.graph.node.remove(widen)
    model.graph.input.append(onnx.helper.make_tensor_value_info(KEPT, onnx.TensorProto.INT64, ["kept"]))
    next(out for out in model.graph.output if out.name == "logits").type.tensor_type.shape.dim[1].dim_param = "kept"
    del model.graph.value_info[:]  # shapes in between, of one position
    onnx.save(model, target / GRAPH)


def _write_graph(source: Path, target: Path, bits: int) -> None:
    """Round the weights of a graph to so many bits, and write it."""
    import onnx

    model = onnx.load(source)
    if bits < 32:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        how = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, accuracy_level=4, bits=bits)
        logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # it tells of every layer
        rounded = MatMulNBitsQuantizer(model, algo_config=how)
        rounded.process()
        model = rounded.model.model
    onnx.save(model, target, save_as_external_data=True, location=f"{GRAPH}.data")


class OnnxCache:
    """Keys and values of some rows, each as long as it is, in one block of memory that is written in place."""

    def __init__(self, llm: OnnxLLM, rows: int = 1) -> None:
        self.llm = llm
        self.lengths = [0] * rows
        self.blocks: list[Tensor] = [torch.empty(rows, llm.heads, 0, llm.head_size) for _ in llm.names]
        self._bound: dict[range, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def layers(self) -> Sequence[OnnxCache]:
        """As caches of transformers have them; all layers are alike."""
        return (self,)

    def get_seq_length(self) -> int:
        """Positions of the longest row."""
        return max(self.lengths)

    def crop(self, positions: int) -> None:
        """Forget all positions but so many; of a negative number, so many of the last."""
        self.lengths = [max(0, n + positions) if positions < 0 else min(n, positions) for n in self.lengths]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Become these rows."""
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.blocks = [block[rows].contiguous() for block in self.blocks]
        self._bound = {}

    def copy_row(self, row: int, other: OnnxCache, other_row: int, positions: int) -> None:
        """Make a row the first positions of a row that is read already, of this or another cache."""
        self.reserve(positions)
        for block, source in zip(self.blocks, other.blocks, strict=True):
            block[row, :, :positions] = source[other_row, :, :positions]
        self.lengths[row] = positions

    def row(self, row: int) -> OnnxCache:
        """A cache of one row alone, no larger than it is."""
        alone = OnnxCache(self.llm)
        alone.lengths = [self.lengths[row]]
        alone.blocks = _blocks(len(self.blocks), 1, self.llm, self.lengths[row])
        alone.copy_row(0, self, row, self.lengths[row])
        return alone

    def reserve(self, positions: int) -> None:
        """Make room for so many positions of a row."""
        if positions <= (room := self.blocks[0].shape[2]):
            return
        room = min(max(positions, 2 * room, ROOM), max(positions, self.llm.positions))
        # Untouched memory takes none: what stands behind a row is never read.
        larger = _blocks(len(self.blocks), len(self.lengths), self.llm, room)
        for new, block in zip(larger, self.blocks, strict=True):
            for row, length in enumerate(self.lengths):
                new[row, :, :length] = block[row, :, :length]
        self.blocks, self._bound = larger, {}

    def bound(self, rows: range) -> Any:
        """The blocks of some rows bound to the runtime; kept while they stay in place."""
        if rows not in self._bound:
            self._bound[rows] = bound = self.llm.session.io_binding()
            for name, block in zip(self.llm.names, self.blocks, strict=True):
                part = block[rows.start : rows.stop]
                _bind(bound.bind_input, f"past_key_values.{name}", part)
                _bind(bound.bind_output, f"present.{name}", part)
        return self._bound[rows]


def _blocks(count: int, rows: int, llm: OnnxLLM, room: int) -> list[Tensor]:
    """Blocks [rows, heads, room, head_size] in memory of their own, which goes back to the system when they go."""
    # Some hundred caches of all lengths would leave holes in the heap that nothing fits.
    shape = (count, rows, llm.heads, room, llm.head_size)
    if not (size := math.prod(shape)):
        return list(torch.empty(shape).unbind())
    return list(torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32).view(shape).unbind())


class OnnxLLM(nn.Module):
    """A language model's embeddings in torch and its layers as a graph; for answers, not for training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        import onnxruntime
        from safetensors.torch import load_file
        from transformers import PreTrainedConfig

        quieten_transformers()
        self.folder = folder
        # Without its own class, whose module would bring the whole architecture along.
        self.config = PreTrainedConfig(**read_json(folder / "config.json"))
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.bits: int = about["bits"]
        # Beside the table, what tells one graph from another.
        self.key: Tensor
        self.register_buffer("key", torch.tensor([self.bits, *bytes.fromhex(about["weights"])]))
        table = load_file(folder / TABLE)["weight"]
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
        try:
            path = str(folder / GRAPH)
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises types of its own
            said = first_line(error)[:160]
            raise CheckpointError(f"{folder}: not a whole graph ({said}); remove the folder") from None
        inputs = {given.name: given.shape for given in self.session.get_inputs()}
        self.names = [name.partition(".")[2] for name in inputs if name.startswith("past_key_values.")]
        text = self.config.get_text_config()
        self.heads = int(inputs[f"past_key_values.{self.names[0]}"][1])
        self.head_size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        self.vocab_size = int(self.session.get_outputs()[0].shape[-1])
        self.positions = int(getattr(text, "max_position_embeddings", 0) or 2**31)

    def get_input_embeddings(self) -> nn.Embedding:
        """As models of transformers have it."""
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        """The head is inside the graph."""

    def train(self, mode: bool = True) -> OnnxLLM:
        """Refuse training; `eval` is always possible."""
        if mode:
            raise ConfigError("a graph cannot be trained: load the model without quantize")
        super().train(mode)
        return self

    def forward(self, position_ids: Tensor | None = None, **_: Any) -> Any:
        """Refuse; `read` is what answers are made with."""
        raise ConfigError("a graph gives next logits alone: load the model without quantize for logits of whole texts")

    @torch.inference_mode()
    def read(
        self,
        embeds: Tensor,  # [B, T, D] behind what the cache holds; of one row [1, T, D]
        cache: OnnxCache,
        row: int | None = None,  # The one row that is read; the first B, a position each, where None
        last: int = 1,  # Positions at the end, within a chunk, whose logits are given
    ) -> Tensor:
        """Read on, one row or a position of each, and give the logits that come next, [B, V], or of a row [last, V]."""
        for start in range(0, embeds.shape[1], CHUNK):
            logits = self._run(embeds[:, start : start + CHUNK], cache, row, last)
        return logits

    def _run(self, embeds: Tensor, cache: OnnxCache, row: int | None, last: int) -> Tensor:
        rows = range(len(embeds)) if row is None else range(row, row + 1)
        assert embeds.shape[1] == 1 or len(rows) == 1  # rows of several lengths read a position each
        embeds = embeds.float().contiguous()
        after = [cache.lengths[each] + embeds.shape[1] for each in rows]
        cache.reserve(max(after))
        # Only how many positions each row has counts; where they stand in the mask does not.
        mask = (torch.arange(max(after)) < torch.tensor(after)[:, None]).long().contiguous()
        kept, logits = torch.arange(-last, 0), torch.empty(len(rows), last, self.vocab_size)
        bound = cache.bound(rows)
        _bind(bound.bind_input, "inputs_embeds", embeds)
        _bind(bound.bind_input, "attention_mask", mask)
        _bind(bound.bind_input, KEPT, kept)
        _bind(bound.bind_output, "logits", logits)
        try:
            self.session.run_with_iobinding(bound)
        except Exception as error:  # onnxruntime raises types of its own
            raise CheckpointError(f"{self.folder}: the graph cannot be run ({first_line(error)[-160:]})") from None
        for each, length in zip(rows, after, strict=True):
            cache.lengths[each] = length
        return logits.flatten(0, 1)


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    """Hand a tensor's own memory to the runtime."""
    kind = np.int64 if tensor.dtype == torch.int64 else np.float32
    bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
