"""Train the small OPT that lies in examples/tiny-opt, from nothing, on the documentation that Python carries.

    python examples/train_tiny_opt.py            # about 5 minutes on 2 cores; writes examples/tiny-opt

A model of this size can be pruned in seconds, and unlike a random one it has learnt something that pruning can
spoil. Training sees the calibration part of `pydocs`; perplexity is that of the evaluation part.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from stages.data.registry import parse_source
from stages.data.tokenization import tokenize
from stages.metrics.language import windows
from stages.metrics.perplexity import perplexity, window_loss

VOCAB, SEQLEN = 1024, 256
CONFIG = OPTConfig(
    vocab_size=VOCAB,
    hidden_size=128,
    word_embed_proj_dim=128,
    ffn_dim=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=SEQLEN,
    dropout=0.1,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>", model_max_length=SEQLEN
    )


@torch.no_grad()
def measure(model: OPTForCausalLM, tokens: torch.Tensor) -> float:
    model.eval()
    return perplexity([window_loss(model(w[None]).logits, w[None]) for w in windows(tokens, SEQLEN)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-opt")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    source = parse_source("pydocs")
    tokenizer = train_tokenizer(list(source.documents("calibration")))
    tokens = tokenize(tokenizer, source.text("calibration"))
    unseen = tokenize(tokenizer, source.text("evaluation"))
    torch.manual_seed(0)
    model = OPTForCausalLM(CONFIG)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(tokens):,} tokens to learn from, {len(unseen):,} unseen", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    started, mean = time.monotonic(), math.log(VOCAB)
    for step in range(1, args.steps + 1):
        warm, done = min(1.0, step / 50), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        model.train()
        starts = torch.randint(0, len(tokens) - SEQLEN, (args.batch,))
        batch = torch.stack([tokens[s : s + SEQLEN] for s in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0:
            elapsed = time.monotonic() - started
            ppl = measure(model, unseen)
            print(f"step {step}: loss {mean:.3f}, perplexity on unseen text {ppl:.2f}, {elapsed:.0f} s", flush=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"perplexity of the saved fp16 weights {measure(model.float(), unseen):.2f}", flush=True)


if __name__ == "__main__":
    main()
