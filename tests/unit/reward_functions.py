"""Reward functions that do what users' functions do, for tests: they are imported in a process of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

calls = 0


def exact(responses, labels):
    return [float(response == label) for response, label in zip(responses, labels, strict=True)]


def number_of_calls(responses):
    global calls
    calls += 1
    return [calls] * len(responses)


def what_it_gets(prompts, responses, labels, num_tokens, truncated):
    print(repr((prompts, responses, labels, num_tokens, truncated)), flush=True)
    return num_tokens


def each_kind(responses):
    import numpy as np

    kinds = [1, 0.5, True, np.float32(0.25), float("nan"), float("inf"), "1.0", None, [1.0], object]
    return kinds[: len(responses)]


def raises(responses):
    raise ValueError("no  number\nin the response")


def exits(responses):
    sys.exit("enough")


def dies(responses):
    os._exit(3)


def is_killed(responses):
    os.kill(os.getpid(), 9)


def hangs(responses):
    time.sleep(600)


def spins(responses):
    while True:
        pass


def hangs_with_a_child(responses):
    child = subprocess.Popen(["sleep", "600"])
    Path(responses[0]).write_text(f"{os.getpid()} {child.pid}")
    child.wait()


def one_too_many(responses):
    return [1.0] * (len(responses) + 1)


def single(responses):
    return 1.0


def mapping(responses):
    return {"score": 1.0}


def prints(responses):
    print("x" * 300_000, flush=True)
    os.write(1, b"y" * 300_000)
    return [1.0] * len(responses)


def everything(**lists):
    return [len(lists)] * len(lists["responses"])


def as_trl_has_it(prompts, completions):
    return [0.0] * len(completions)


def reacts_to_the_label(responses, labels):
    """Raises, hangs, dies or answers, as the label says."""
    [label] = labels
    if label == "raise":
        raise ValueError("bad label")
    if label == "hang":
        time.sleep(600)
    if label == "die":
        os._exit(4)
    return [1.0]


not_callable = 3


def brief(num_tokens):
    return [1.0 / count for count in num_tokens]


def even(responses):
    """Right or wrong, as verifiable rewards are: many prompts have responses that are all the one or all the other."""
    return [float(len(response) % 2 == 0) for response in responses]


def picky(responses, labels):
    """Has a score for responses of an even length only."""
    for response, label in zip(responses, labels, strict=True):
        if len(response) % 2:
            raise ValueError(f"cannot judge an answer to {label}")
    return [float(len(response)) for response in responses]
