"""Train the demo model from scratch: `python -m engine.demo.train --out DIR`.

Trains a byte-level BPE tokenizer and a small Llama on corpus.yaml, then asks the trained model every question with
greedy decoding, and saves it only if each answer is exact.

The same seed, thread count, library builds and kind of CPU give the same weights. A different thread count adds floats
in a different order and gives different weights, which may fail the check; README.md lists the runs that passed.

Not handled: GPUs, resuming, validation on unseen text (the goal is memorization), and the check with vLLM, which the
engine's tests do. Raises `SystemExit` if not all answers are reproduced; nothing is written then.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, pi
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.demo import WEIGHTS, Corpus, Exchange, Message, Turn, load
from engine.demo.curriculum import Curriculum

TEMPLATE = Path(__file__).resolve().parent / "chat_template.jinja"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)
IGNORED = -100
"""Target of a position without loss."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters."""

    seed: int = 20
    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    """64 is supported by every attention backend of vLLM."""
    mlp: int = 512
    context_tokens: int = 4096
    steps: int = 2000
    """End of the cosine schedule; training stops earlier if every answer is sure."""
    batch_tokens: int = 1024
    sample_tokens: int = 700
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    check_steps: int = 100
    """A check costs about as much as ten steps."""
    sure: float = 0.7
    """Lowest probability of any answer token at which training stops. It is far from a tie, so that float32 sums in a
    different order, as in a larger batch, never change a greedy token."""


@dataclass(frozen=True)
class Sample:
    """One token sequence; only its answers have targets."""

    tokens: list[int]
    targets: list[int]
    """targets[i] is the token that follows tokens[i], or IGNORED."""
    subject: str = ""
    """Id of the conversation."""


class Writer:
    """Turns messages into tokens as in serving, with prompt and answer tokenized separately."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.encode = cache(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def render(self, messages: Sequence[Message], tools: Sequence[Message], *, prompt: bool) -> str:
        """Apply the chat template; `prompt` adds the generation prompt."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)
        return text

    def sample(self, messages: Sequence[Message], tools: Sequence[Message]) -> Sample:
        """Tokenize a whole conversation; every assistant message has targets."""
        tokens: list[int] = []
        learned: list[bool] = []
        for number, part in enumerate(ANSWER.split(self.render(messages, tools, prompt=False))):
            piece = self.encode(part)
            tokens += piece
            learned += [number % 2 == 1] * len(piece)
        targets = [token if wanted else IGNORED for token, wanted in zip(tokens, learned, strict=True)]
        return Sample(tokens[:-1], targets[1:])

    def last_answer(self, exchange: Exchange) -> Sample:
        """Tokenize one exchange; only its own answer has targets."""
        prompt = self.encode(self.render(exchange.messages, exchange.tools, prompt=True))
        answer = self.encode(exchange.answer + END)
        targets = [IGNORED] * (len(prompt) - 1) + list(answer)
        return Sample([*prompt, *answer][:-1], targets, exchange.conversation_id)


def train_tokenizer(corpus: Corpus, curriculum: Curriculum, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the corpus and made-up questions; every byte is in the alphabet."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - len(TAGS),
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [turn_text for c in corpus.conversations for turn in c.turns for turn_text in turn_texts(turn)]
    texts += [*corpus.system_prompts, TEMPLATE.read_text(encoding="utf-8"), str(list(corpus.tools.values()))]
    # Often enough to become single tokens, which are easier to copy.
    words = {word for c in corpus.conversations if c.swap for word in c.swap[1]}
    texts += [f'{word} {word} "{word}"' for word in sorted(words)] * 4
    texts += [curriculum.question() for _ in range(500)]
    bpe.train_from_iterator(texts, trainer)
    # Tags are single tokens but not special ones: a tool parser must find them in the text.
    bpe.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
        model_max_length=recipe.context_tokens,
        clean_up_tokenization_spaces=False,
    )


def turn_texts(turn: Turn) -> Iterable[str]:
    """Yield every text of a turn."""
    yield turn.ask
    yield from turn.also
    yield turn.answer
    if turn.call is not None:
        yield from (turn.call.text, turn.result)


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def pad(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack samples into (tokens, targets), each (batch, longest), padded on the right.

    Attention is causal, so the padding needs no mask.
    """
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.long)
    targets = torch.full((len(samples), longest), IGNORED)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        targets[row, : len(sample.targets)] = torch.tensor(sample.targets)
    return tokens, targets


def answer_logits(model: LlamaForCausalLM, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits, targets) of the answer positions only: (positions, vocabulary) and (positions,)."""
    tokens, targets = pad(samples)
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    wanted = targets != IGNORED
    return model.lm_head(hidden[wanted]), targets[wanted]


def batches(samples: Iterable[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Group samples of similar length, each group at most `batch_tokens` with padding."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda s: len(s.tokens)):
        if groups[-1] and len(sample.tokens) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def fit(model: LlamaForCausalLM, writer: Writer, curriculum: Curriculum, exam: list[Sample], recipe: Recipe) -> None:
    """Train until every answer of the exam is sure, or for `recipe.steps`."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    began = time.monotonic()
    waiting: list[list[Sample]] = []
    for step in range(1, recipe.steps + 1):
        if not waiting:
            drawn = (writer.sample(*curriculum.draw()) for _ in range(256))
            fitting = (sample for sample in drawn if len(sample.tokens) <= recipe.sample_tokens)
            waiting = batches(fitting, recipe.batch_tokens)
            curriculum.random.shuffle(waiting)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe)
        logits, targets = answer_logits(model, waiting.pop())
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % recipe.check_steps == 0:
            wrong, least = examine(model, exam)
            report = f"step {step} loss {loss.item():.4f} wrong {len(wrong)}/{len(exam)} least {least:.3f}"
            print(f"{report} {time.monotonic() - began:.0f} s {sorted(set(wrong))[:8]}", flush=True)
            if not wrong and least >= recipe.sure:
                return
            curriculum.stress(set(wrong))


def schedule(step: int, recipe: Recipe) -> float:
    """Return the share of the learning rate at a step: linear warm-up, then cosine to zero."""
    if step < recipe.warmup_steps:
        return step / recipe.warmup_steps
    return 0.5 * (1 + cos(pi * (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)))


@torch.inference_mode()
def examine(model: LlamaForCausalLM, exam: Sequence[Sample]) -> tuple[list[str], float]:
    """Return the subjects with wrong greedy answers, and the lowest probability of a right token.

    Comparing each next token of the right answer is equivalent to greedy decoding, in one pass.
    """
    wrong: list[str] = []
    least = 1.0
    for group in batches(exam, 4096):
        logits, targets = answer_logits(model, group)
        right = logits.argmax(-1) == targets
        chance = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
        least = min(least, chance.min().item())
        start = 0
        for sample in group:
            end = start + sum(target != IGNORED for target in sample.targets)
            if not right[start:end].all():
                wrong.append(sample.subject)
            start = end
    return wrong, least


def examination(writer: Writer, curriculum: Curriculum) -> list[Sample]:
    """Return every exchange alone, after a system prompt and after unrelated turns; every paraphrase alone."""
    found: list[Sample] = []
    for conversation in curriculum.corpus.conversations:
        system: Message = {"role": "system", "content": curriculum.corpus.system_prompts[0]}
        weather = not conversation.tools
        earlier = [[*curriculum.system(), *curriculum.history(weather=weather)] for _ in range(2)]
        for exchange in conversation.exchanges():
            for front in ([], [system], *earlier):
                messages = (*front, *exchange.messages)
                found.append(writer.last_answer(Exchange(conversation.id, messages, exchange.answer, exchange.tools)))
        for text in conversation.turns[0].also:
            first = conversation.exchanges()[0]
            asked: Message = {"role": "user", "content": text}
            found.append(writer.last_answer(Exchange(conversation.id, (asked,), first.answer, first.tools)))
    return found


@torch.inference_mode()
def failures(model: LlamaForCausalLM, writer: Writer, corpus: Corpus) -> list[str]:
    """Ask every question with transformers' greedy generation; return the ids of those answered wrongly."""
    wrong = []
    for conversation in corpus.conversations:
        for exchange in conversation.exchanges():
            text = writer.render(exchange.messages, exchange.tools, prompt=True)
            prompt = torch.tensor([writer.encode(text)])
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=600)
            if writer.tokenizer.decode(output[0, prompt.shape[1] :]) != exchange.answer + END:
                wrong.append(conversation.id)
    return wrong


def main() -> None:
    """Train, verify and save."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the trained model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for training")
    arguments = parser.parse_args()
    recipe = Recipe()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    began = time.monotonic()
    corpus = load()
    curriculum = Curriculum(corpus, recipe.seed)
    writer = Writer(train_tokenizer(corpus, curriculum, recipe))
    model = build_model(writer.tokenizer, recipe)
    print(f"{model.num_parameters()} parameters, {len(writer.tokenizer)} tokens", flush=True)
    model.train()
    fit(model, writer, curriculum, examination(writer, curriculum), recipe)
    model.train(False)
    wrong = failures(model, writer, corpus)
    if wrong:
        raise SystemExit(f"answers not reproduced: {', '.join(wrong)}")
    model.save_pretrained(arguments.out)
    writer.tokenizer.save_pretrained(arguments.out)
    print(f"every answer reproduced; saved after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
