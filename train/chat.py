"""Talking to a model in a terminal: lines in, pieces of the answer out as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from data_pipelines.protocols.base import Functions
from data_pipelines.samplers.base import Conversation, Sampler
from data_pipelines.samplers.requests import attached, listing
from train.exits import ExitCode, UserError
from train.sample import Given

PROMPT = "> "


def chat(
    sampler: Sampler,
    functions: Functions,
    given: Given,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], object] | None = None,
) -> int:
    """A conversation until the input ends or `/quit`.

    `/NAME FILE` attaches a picture to the next message, by input name (`/image cat.png`); `/new`
    begins anew; a conversation may have commands of its own. What does not fit is said, and the
    conversation goes on.

    Args:
      given: pictures of `--input` are attached to the first message.
      read: a line, given the prompt; raises EOFError at the end. write: a piece of text, shown at
        once.

    Raises:
      UserError: a sampler that does not talk.
    """
    say = _show if write is None else write
    conversation = _begin(sampler, functions)
    pictures = tuple(i.name for i in sampler.inputs() if i.kind == "picture")
    waiting: dict[str, tuple[Path, ...]] = {}
    for name, path in attached(sampler, given.pairs):
        waiting[name] = (*waiting.get(name, ()), path)
    own = conversation.commands
    commands = ", ".join([*(f"/{name} FILE" for name in pictures), *own, "/new", "/quit"])
    say(f"{commands}; anything else is a message\n")
    while True:
        try:
            line = read(PROMPT).strip()
        except EOFError:
            return ExitCode.OK
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return ExitCode.OK
        if word == "/new":
            conversation, waiting = _begin(sampler, functions), {}
        elif word.startswith("/") and word[1:] in pictures:
            path = Path(rest.strip()).expanduser()
            if path.is_file():
                waiting[word[1:]] = (*waiting.get(word[1:], ()), path)
            else:
                say(f"no file {path}\n")
        elif word.startswith("/") and word not in own:
            say(f"no command {word}; {commands}\n")
        elif line:
            try:
                for piece in conversation.say(line, waiting):
                    say(piece)
                say("\n")
            except ValueError as error:
                say(f"[{error}; {listing(sampler)}]\n")
            else:
                waiting = {}


def _begin(sampler: Sampler, functions: Functions) -> Conversation:
    found = sampler.conversation(functions)
    if found is None:
        raise UserError(
            f"{type(sampler).__name__}: expected a sampler that talks for --chat, found one that "
            "does not; leave --chat out"
        )
    return found


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
