"""What a model writes on: greedy continuations of short prompts, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stages.data.tokenization import load_tokenizer
from stages.interfaces import Watcher
from stages.models.loader import loader_of


@torch.no_grad()
def continue_prompts(
    folder: Path,
    prompts: Sequence[str],
    num_tokens: int,
    device: torch.device,
    callbacks: Watcher,
    trusts_code: bool = False,
) -> tuple[str, ...]:
    """What the model in `folder` writes after each prompt: at each place its most probable token.

    At most `num_tokens` tokens, fewer where the text ends or the model has no more positions. Unlike pruning, this
    has the whole model in memory, in the dtype that it is stored in.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading; `callbacks` tells how far this is
    tokenizer = load_tokenizer(folder, trusts_code=trusts_code)
    loader = getattr(transformers, loader_of(folder))
    model = loader.from_pretrained(folder, dtype="auto", trust_remote_code=trusts_code)
    model.eval().to(device)
    num_positions = getattr(model.config, "max_position_embeddings", None)
    texts = []
    for number, prompt in enumerate(prompts):
        callbacks.check_stop()
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
        room = num_tokens if num_positions is None else min(num_tokens, num_positions - ids.shape[1])
        written = ids
        if room > 0 and ids.shape[1]:
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                # A model's own generation settings may ask for sampling or a limit: this is about its weights alone.
                temperature=None,
                top_p=None,
                top_k=None,
                max_length=None,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
        callbacks.report(number + 1, len(prompts), "prompts")
    return tuple(texts)
