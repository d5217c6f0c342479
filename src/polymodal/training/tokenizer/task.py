"""Learning an image tokenizer: draw an image again from its codes.

The loss is that of pixels and the quantizer's own; the codebook moves once a step, after the optimizer. A step's loss
is a sum over its images, so gradients of processes are summed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.modeling.tokenizers import CONFIG, build_image_tokenizer, load_image_tokenizer, save_image_tokenizer
from polymodal.modeling.tokenizers.config import PatchCodebookConfig
from polymodal.modeling.tokenizers.patch_codebook import PatchCodebook
from polymodal.training.checkpoint import State, identity
from polymodal.training.distributed import Engine
from polymodal.training.optimizer import Group, apply_policy
from polymodal.training.process_group import World
from polymodal.training.recipes.tokenizer import TokenizerRecipe
from polymodal.training.reporting.log import LossByKind, merge
from polymodal.training.steps import Order, Steps
from polymodal.training.task import StepPlan, Task
from polymodal.training.tokenizer.dataset import ImageDataset, read_images
from polymodal.training.tokenizer.evaluate import draw_grid, evaluate_tokenizer
from polymodal.utils.files import atomic_folder, write_text
from polymodal.utils.progress import log

METADATA_NAME = "training.json"
BASELINE = "baseline"
_PATCHES = 200_000
"""Patches that k-means learns from, at most."""


@dataclass(frozen=True)
class PixelBatch:
    """A micro-batch of images."""

    pixels: torch.Tensor  # [N, 3, H, W] uint8
    codes: int  # Of all of them


class TokenizerTask(Task):
    """See `Task`."""

    document: ClassVar[str] = CONFIG
    log_keys: ClassVar[tuple[str, str]] = ("terms", "metrics")
    sums_gradients: ClassVar[bool] = True

    def __init__(self, recipe: TokenizerRecipe, world: World, inputs: Any = None) -> None:
        self.recipe: TokenizerRecipe = recipe
        self.world = world
        self.model: Any = inputs or _start(recipe)  # an `ImageTokenizer` that can `reconstruct`
        if not hasattr(self.model, "reconstruct"):
            raise ConfigError(
                f"init: a {type(self.model).__name__} cannot be trained; start from an `image_vq`, or a VQModel of "
                "diffusers"
            )
        self.dataset: ImageDataset
        self.held_out: ImageDataset | None = None
        self.scores: dict[str, Any] = {}

    def choose_parameters(self) -> list[Group]:
        """Apply the recipe's rules."""
        if self.recipe.batch.global_size % self.world.size:
            raise ConfigError(
                f"batch.global_size {self.recipe.batch.global_size} cannot be shared evenly by {self.world.size} "
                "processes"
            )
        return apply_policy(self.model, self.recipe.train, None, self.recipe.optim)

    def load_data(self) -> None:
        """Read the images and the held-out images."""
        recipe, folder, side = self.recipe, Path(self.recipe.output_dir), self.model.image_size
        self.dataset = read_images(recipe.data.mix, recipe, side, folder / "skipped.jsonl")
        if recipe.data.eval:
            self.held_out = read_images(recipe.data.eval, recipe, side, folder / "skipped_eval.jsonl")
        self.fingerprint = self.dataset.fingerprint
        self.steps = Steps(Order(self.dataset.mixture, recipe.run.seed), recipe.batch.global_size)

    def prepare(self, fresh: bool) -> None:
        """Nothing comes before the first step; the codebook begins with its first images."""

    def plan(self, step: int) -> StepPlan:
        """Cut this process's share of the step's images into micro-batches."""
        indices = self.steps.indices(step)
        own = np.array_split(indices, self.world.size)[self.world.rank]
        size = self.recipe.batch.micro_size
        micro = [own[start : start + size] for start in range(0, len(own), size)]
        return StepPlan(step, micro, len(indices), len(indices), len(indices) * self.model.grid.area)

    def load(self, micro: np.ndarray) -> PixelBatch:
        """Read images."""
        return PixelBatch(self.dataset.pixels(micro), len(micro) * self.model.grid.area)

    def padded_tokens(self, batch: PixelBatch) -> int:
        """Count the codes of a micro-batch."""
        return batch.codes

    def backward(self, engine: Engine, plan: StepPlan, batches: Iterator[PixelBatch], losses: LossByKind) -> float:
        """Draw each micro-batch again from its codes."""
        weights, total = self.recipe.tokenizer, 0.0
        for batch in batches:
            count = len(batch.pixels)
            pixels = batch.pixels.to(self.world.device).float() / 255
            drawn, found = engine.forward(True, pixels=pixels)
            off = drawn.float() - pixels
            terms = {"l1": weights.l1 * off.abs().mean(), "mse": weights.mse * off.square().mean(), "vq": found.loss}
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            (loss * (count / plan.targets)).backward()  # type: ignore[no-untyped-call]
            sums = {name: [float(term.detach()) * count, float(count)] for name, term in terms.items()}
            losses.kinds = merge([losses.kinds, sums])
            total += float(loss.detach()) * count
        return total

    def after_step(self) -> None:
        """Let the codebook take up what it saw."""
        self.model.after_step()

    def evaluate(self, engine: Engine, step: int) -> dict[str, Any] | None:
        """Score the held-out images, and draw some of them."""
        if self.held_out is None:
            return None
        self.model.eval()
        self.scores = evaluate_tokenizer(self.model, self.held_out, self.world)
        if self.recipe.tokenizer.shown and self.world.is_main:
            path = Path(self.recipe.output_dir) / "reconstructions" / f"step-{step:07d}.png"
            draw_grid(self.model, self.held_out, self.recipe.tokenizer.shown, self.world.device, path)
        return {"step": step, "data": "held-out", **self.scores}

    def export(self, final: Path, groups: Sequence[Group], state: State) -> None:
        """Write the tokenizer's folder, unless it leaves too much of its codebook unused."""
        recipe, settings = self.recipe, self.recipe.tokenizer
        for name, tensor in self.model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{final}: {name} holds NaN or infinity; nothing was saved")
        self.model.eval()
        if self.held_out is not None and not self.scores:  # finished in an earlier call
            self.scores = evaluate_tokenizer(self.model, self.held_out)
        scores = self.scores
        if scores and scores["used"] < settings.min_usage:
            raise PolymodalError(
                f"{recipe.name}: {scores['used']:.1%} of {scores['codes']} codes are used on the held-out images, "
                f"fewer than tokenizer.min_usage {settings.min_usage:.1%}; choose fewer codes, a larger revive_below, "
                "an fsq quantizer, or a lower min_usage and run the same command to keep this tokenizer"
            )
        baseline = self._baseline(final.parent / BASELINE) if settings.baseline and self.held_out is not None else None
        metadata = {
            "stage": recipe.name,
            "steps": state.step,
            "samples": state.samples,
            "loss": self.last_loss(),
            "held_out": scores,
            **({"k_means": baseline} if baseline else {}),
            "recipe": identity(recipe),
        }
        with atomic_folder(final, replace=True) as work:
            write_text(work / METADATA_NAME, json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
            dtype = torch.float16 if settings.save_dtype == "float16" else None
            save_image_tokenizer(self.model, work, dtype)

    def _baseline(self, folder: Path) -> dict[str, Any]:
        """Score k-means with as many codes an image and as large a codebook, learnt from the same images."""
        assert self.held_out is not None
        grid, side = self.model.grid, self.model.image_size
        config = PatchCodebookConfig(
            image_size=side, patch_size=side // grid.height, codebook_size=self.model.codebook_size
        )
        count = min(len(self.dataset), max(1, 4 * _PATCHES // grid.area))
        some = np.random.default_rng(self.recipe.run.seed).permutation(len(self.dataset))[:count]
        codebook = PatchCodebook(config).fit(
            self.dataset.pixels(some).float() / 255, seed=self.recipe.run.seed, most=_PATCHES
        )
        scores = evaluate_tokenizer(codebook, self.held_out)
        with atomic_folder(folder, replace=True) as work:
            save_image_tokenizer(codebook, work)
        ahead = self.scores["psnr"] - scores["psnr"]
        log(
            f"{self.recipe.name}: {self.scores['psnr']:.2f} dB on held-out images, k-means with as many codes "
            f"{scores['psnr']:.2f} dB ({ahead:+.2f} dB); {self.scores['used']:.1%} of codes used"
        )
        return scores


def _start(recipe: TokenizerRecipe) -> Any:
    """Build or load what the recipe starts from."""
    torch.manual_seed(recipe.run.seed)
    if recipe.init.model is not None:
        return build_image_tokenizer(recipe.init.model)
    assert recipe.init.from_folder is not None
    return load_image_tokenizer(recipe.init.from_folder)
