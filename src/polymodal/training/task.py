"""What a training stage gives the trainer: its model, its micro-batches, their gradient, its evaluation, its export.

The trainer knows steps, schedules, checkpoints, logs and signals; a task knows what is learnt from what. Supervised
tuning (`sft.task`) and contrastive pairs (`contrastive.task`) are two. A further one is a folder with its `Task`, a
recipe class that names it, and that class in `recipes.load.RECIPES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from polymodal.data.index import Reading
from polymodal.training.checkpoint import State
from polymodal.training.distributed import Engine
from polymodal.training.optimizer import Group
from polymodal.training.process_group import World
from polymodal.training.recipes.sections import DataBase, RecipeBase
from polymodal.training.reporting.log import LossByKind, read_log
from polymodal.training.steps import Steps


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: known to every process before a sample is touched."""

    step: int
    micro: Sequence[Any]  # This process's micro-batches, as `Task.load` takes them
    samples: int  # Over all processes, as the two below
    targets: int  # By which the step's loss is divided: trained tokens, or pairs
    tokens: int  # Padding not counted


class Task(ABC):
    """What is trained, and how; the trainer calls its methods in the order in which they stand here.

    Attributes:
        document: The file in `final/` that is written last; where it is, the model is whole.
        log_keys: What the two tables of `LossByKind` are called in `log.jsonl`.
        sums_gradients: Whether each process's loss is its share of the global one, so that gradients are summed once a
            step; else they are averaged over processes in the backward pass, by DDP or FSDP2.
        recipe: The stage.
        world: The processes of the run.
        model: The model, from the start on.
        steps: Which samples make each step; set by `prepare` at the latest.
        fingerprint: Hash of the data; a resumed run must see the same. Set by `prepare` at the latest.
    """

    document: ClassVar[str]
    log_keys: ClassVar[tuple[str, str]]
    sums_gradients: ClassVar[bool] = False

    recipe: RecipeBase
    world: World
    model: nn.Module
    steps: Steps
    fingerprint: str

    @abstractmethod
    def __init__(self, recipe: RecipeBase, world: World, inputs: Any = None) -> None:
        """Load or build the model, on the CPU; `inputs` is one in memory, in place of what `recipe.init` names."""

    @abstractmethod
    def choose_parameters(self) -> list[Group]:
        """Freeze the model, add what is trained beside it, such as adapters, and group exactly what has a gradient."""

    @abstractmethod
    def load_data(self) -> None:
        """Read the data and fill caches; the first process does it before the others."""

    @abstractmethod
    def prepare(self, fresh: bool) -> None:
        """Do what comes before the first step and needs data: measure, warm up, save memory.

        Args:
            fresh: Whether the run starts here; else a checkpoint is loaded next.
        """

    @abstractmethod
    def plan(self, step: int) -> StepPlan:
        """Plan one optimizer step, as a pure function of the recipe, the data and the step.

        Args:
            step: Its number, from 0.

        Returns:
            What this process takes of it, and its sizes.
        """

    @abstractmethod
    def load(self, micro: Any) -> Any:
        """Make a micro-batch on the CPU; runs in threads, ahead of the model.

        Args:
            micro: An entry of `StepPlan.micro`.

        Returns:
            What `backward` takes.
        """

    def padded_tokens(self, batch: Any) -> int:
        """Count the tokens of a micro-batch, padding among them.

        Args:
            batch: What `load` gave.

        Returns:
            The count.
        """
        return int(batch.input_ids.numel())

    def lost_targets(self, batch: Any) -> int:
        """Count the planned targets that a micro-batch has not, since their image could not be read any more.

        Args:
            batch: What `load` gave.

        Returns:
            The count; the step's loss is divided by what is left.
        """
        return 0

    @abstractmethod
    def backward(
        self, engine: Engine, plan: StepPlan, batches: Iterator[Any], losses: LossByKind
    ) -> torch.Tensor | float:
        """Run the micro-batches of a step and leave its gradient; the random state is that of the step.

        Args:
            engine: Runs the model.
            plan: The step.
            batches: As many micro-batches as the plan has.
            losses: Takes the parts of the loss, for the log.

        Returns:
            This process's loss times `plan.targets`, detached.
        """

    def after_step(self) -> None:  # noqa: B027  # most tasks have nothing to do
        """Keep parameters in their range, such as a temperature; called after every optimizer step."""

    @abstractmethod
    def evaluate(self, engine: Engine, step: int) -> dict[str, Any] | None:
        """Score the held-out data; changes nothing in the run, and every process takes part.

        Args:
            engine: Runs the model.
            step: Steps done.

        Returns:
            A line of `eval.jsonl`; None where there is nothing to score.
        """

    @abstractmethod
    def export(self, final: Path, groups: Sequence[Group], state: State) -> None:
        """Write the trained model, which does not show how many processes trained it.

        Args:
            final: The folder to write.
            groups: What was trained.
            state: Where the run ended.
        """

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.steps.total(self.recipe.run.epochs)
        return min(total, self.recipe.run.max_steps or total)

    def rounding(self) -> str | None:
        """Say how a run of whole steps differs from the epochs that were asked for; None where it does not."""
        epochs, size, total = self.recipe.run.epochs, self.steps.order.epoch_size, self.total_steps
        by_tokens = getattr(self.recipe.batch, "global_tokens", None) is not None
        if by_tokens or total < self.steps.total(epochs) or self.recipe.run.max_minutes is not None:
            return None
        wanted, taken = round(epochs * size), self.steps.taken(total)
        if taken == wanted:
            return None
        change = f"{wanted - taken} fewer" if taken < wanted else f"{taken - wanted} more"
        short = "batch.last_step=short or " * hasattr(self.recipe.batch, "last_step")
        return (
            f"{total} whole steps of {self.steps.global_size} take {taken} samples, {change} than {epochs:g} epochs of "
            f"{size}: each is seen {taken / size:.3g} times on average; {short}another batch.global_size makes it exact"
        )

    def last_loss(self) -> float | None:
        """The last loss that was logged, for the model's history."""
        lines = [line for line in read_log(Path(self.recipe.output_dir) / "log.jsonl") if line["loss"] is not None]
        return lines[-1]["loss"] if lines else None


def read_mix(data: DataBase, seed: int) -> list[tuple[Reading, float]]:
    """List the data files; nothing is read yet."""
    return [
        (
            Reading(
                path=Path(source.path),
                image_root=Path(source.image_root) if source.image_root is not None else None,
                format=source.format,
                annotations=Path(source.annotations) if source.annotations is not None else None,
                kind=source.kind,
                source=source.source,
                prompt=source.prompt,
                draw=(source.max_samples, (seed, number)) if source.max_samples is not None else None,
            ),
            source.repeat,
        )
        for number, source in enumerate(data.mix)
    ]
