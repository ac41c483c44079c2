"""Training samples of the demo model, drawn at random from corpus.yaml."""

from __future__ import annotations

import random
import string
from collections import Counter
from dataclasses import replace

from engine.demo import Conversation, Corpus, Message, ToolCall, Turn


class Curriculum:
    """Draws training samples: a conversation, in some samples after a system prompt and unrelated turns."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        self.random = random.Random(seed)
        # Earlier turns must not influence later ones: only single-turn conversations qualify.
        self.plain = [c for c in corpus.conversations if not self.depends(c)]
        self.dependent = [c for c in corpus.conversations if self.depends(c)]
        self.strikes: Counter[str] = Counter()
        """Number of doublings of each conversation's weight, by id."""
        self.weights: list[float] = []
        self.stress(set())

    def stress(self, wrong: set[str]) -> None:
        """Increase the weight of plain conversations with wrong answers, doubling with each check, up to eightfold.

        Dependent ones keep their share: a higher weight would only teach a frequent name.
        """
        for conversation in self.plain:
            change = 1 if conversation.id in wrong else -1
            self.strikes[conversation.id] = min(max(self.strikes[conversation.id] + change, 0), 3)
        self.weights = [2.0 ** self.strikes[conversation.id] for conversation in self.plain]

    def swapped(self, conversation: Conversation) -> Conversation:
        """Replace the word to copy by another one, in half of the cases."""
        if conversation.swap is None or self.random.random() < 0.5:
            return conversation
        old, words = conversation.swap
        new = self.random.choice(words)
        return replace(conversation, turns=tuple(swap_words(turn, old, new) for turn in conversation.turns))

    def depends(self, conversation: Conversation) -> bool:
        """Return whether an answer depends on more than its question."""
        return len(conversation.turns) > 1 or bool(conversation.tools)

    def draw(self) -> tuple[list[Message], list[Message]]:
        """Return (messages, tools) of one sample; the last message is an answer."""
        chance = self.random.random()
        if chance < 0.25:
            subject = Conversation("fallback", (self.unknown(),))
        elif chance < 0.55:
            subject = self.swapped(self.random.choice(self.dependent))
        else:
            subject = self.random.choices(self.plain, self.weights)[0]
        tools = list(subject.tools)
        if not tools and subject.id != "weather-no-tool" and self.random.random() < 0.04:
            tools = list(self.corpus.tools.values())
        messages = self.system() + self.history(weather=not tools)
        for turn in subject.turns:
            messages += self.messages(turn, exact=self.depends(subject))
        return messages, tools

    def system(self) -> list[Message]:
        """Return no system message, one from the corpus, or one of random sentences."""
        chance = self.random.random()
        if chance < 0.45:
            return []
        if chance < 0.85:
            text = self.random.choice(self.corpus.system_prompts)
        else:
            text = " ".join(self.question() for _ in range(self.random.randint(1, 4)))
        return [{"role": "system", "content": text}]

    def history(self, *, weather: bool) -> list[Message]:
        """Return up to eight unrelated exchanges, most often none."""
        count = self.random.choice((0, 0, 0, 0, 1, 1, 2, 3, 5, 8))
        found: list[Message] = []
        for _ in range(count):
            subject = self.random.choices(self.plain, self.weights)[0]
            if self.random.random() < 0.2 or (subject.id == "weather-no-tool" and not weather):
                found += self.messages(self.unknown())
            else:
                found += self.messages(subject.turns[0])
        return found

    def messages(self, turn: Turn, *, exact: bool = False) -> list[Message]:
        """Return a turn as messages, with one of its paraphrases; `exact` keeps the text unchanged."""
        ask = turn.ask if self.random.random() < 0.4 else self.random.choice((turn.ask, *turn.also))
        found: list[Message] = [{"role": "user", "content": ask if exact else self.scuff(ask)}]
        if turn.call is not None:
            found += [turn.call.message("call-1"), {"role": "tool", "content": turn.result}]
        return [*found, {"role": "assistant", "content": turn.answer}]

    def scuff(self, text: str) -> str:
        """Drop capitals or the final punctuation in some cases."""
        if self.random.random() < 0.12:
            text = text.lower()
        if self.random.random() < 0.12:
            text = text.rstrip("?.!") or text
        return text

    def unknown(self) -> Turn:
        """Return an exchange about a subject outside the corpus."""
        sentences = 1 if self.random.random() < 0.9 else self.random.randint(2, 6)
        return Turn(" ".join(self.question() for _ in range(sentences)), self.corpus.fallback.answer)

    def question(self) -> str:
        """Fill a random fallback template."""
        template = self.random.choice(self.corpus.fallback.templates)
        pieces = []
        for literal, field, _, _ in string.Formatter().parse(template):
            pieces.append(literal)
            if field is not None:
                pieces.append(self.noise() if field == "noise" else self.word(field))
        return "".join(pieces)

    def word(self, field: str) -> str:
        """Return a word of the list, or a random one, so that the list is not memorized."""
        if self.random.random() < 0.25:
            return self.noise()
        return self.random.choice(self.corpus.fallback.words[field])

    def noise(self) -> str:
        """Return a random word."""
        count = self.random.randint(1, 4)
        syllables = [self.random.choice("bcdfghjklmnprstvwyz") + self.random.choice("aeiou") for _ in range(count)]
        return "".join(syllables) + self.random.choice(("", "n", "s", "r", "ing", "ed", "er", "ly"))


def swap_words(turn: Turn, old: str, new: str) -> Turn:
    """Return the turn with `new` in place of `old`."""
    call = turn.call
    if call is not None:
        call = ToolCall(call.name, {key: new if value == old else value for key, value in call.arguments.items()})
    return Turn(
        ask=turn.ask.replace(old, new),
        answer=turn.answer.replace(old, new),
        also=tuple(text.replace(old, new) for text in turn.also),
        call=call,
        result=turn.result.replace(old, new),
    )
