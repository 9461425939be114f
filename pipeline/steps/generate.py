"""Step: let the original model write samples to distill on, and compute its output on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.results import GenerateResult
from pipeline.steps.teach import run_original

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks


class Generate(StepKind[GenerateResult]):
    """Writes the generated samples, and the last block's output on them in the original model."""

    result = GenerateResult
    name = "generate"
    title = "let the original model write samples"
    help = "Let the original model write samples to distill on, and run it on them (--distill-generated)."
    is_long = True
    command = name
    absence = "begin a run that has it: lampctl run MODEL ... --distill-generated N --from-run {run}"

    @staticmethod
    def step(num_blocks: int, *, draws: bool) -> Step:
        """The step in the plan.

        Args:
            num_blocks: Of the model.
            draws: There is a distillation set of its own (--distill-samples), which has the prompts.
        """
        prompts = payloads.DISTILLATION_SET if draws else payloads.CALIBRATION
        teacher = payloads.teacher(num_blocks, payloads.GENERATED_SET)
        return Step(Generate.name, reads=(prompts.name,), outputs=(payloads.GENERATED_SET, teacher))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> GenerateResult:
        from pipeline.steps.stage_settings import distill_settings
        from stages.generate_samples import generate_samples

        config = context.config
        assert config.distill_generated is not None
        given = context.stage(callbacks, samples=context.distillation_samples)
        tokens, name = len(given.inputs[0]), payloads.GENERATED_SET.name
        samples = attempt.stream(name, config.distill_generated, (tokens,), given.inputs[0].dtype, is_precious=True)
        num_real = generate_samples(
            given,
            samples,
            config.seed,
            holds_out=distill_settings(config).holds_out,
            is_resident=context.generates_resident,
        )
        run_original(context, samples, step, attempt, callbacks)
        return GenerateResult(
            num_samples=len(samples),
            num_tokens=len(samples) * tokens,
            num_real=num_real,
        )

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        if payload == payloads.GENERATED_SET.name:
            return context.num_generated_tokens * context.model.input_bytes_per_token
        return context.activation_bytes(context.num_generated_tokens)

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        """Hidden states of the original model's own samples."""
        return context.activation_bytes(context.num_generated_tokens)

    @classmethod
    def headline(cls, result: GenerateResult) -> str:
        return f"{result.num_tokens:,} tokens in {result.num_samples} samples"
